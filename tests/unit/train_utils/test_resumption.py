"""Settings of a run in its checkpoints."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest

from slim_utils.families import LayerShape
from slim_utils.layerwise.resume import setting_changes
from slim_utils.masks import LayerMask
from tests.tiny_models import make_tiny
from train_utils.finetune_args import TrainingArguments, parse_args
from train_utils.resumption import masks_hash, run_settings

SHAPE = LayerShape(num_heads=4, num_kv_heads=2, head_dim=4, num_columns=3)


def test_masks_hash_stays_the_same_across_versions():
    masks = [LayerMask(SHAPE, [0, 2], [0, 1], [1, 2]), LayerMask.dense(SHAPE)]
    # Stored in the checkpoints of earlier versions.
    assert masks_hash(masks) == "711eec220e5e14a4"
    assert masks_hash(masks[::-1]) != masks_hash(masks)
    assert masks_hash([LayerMask(SHAPE, [0, 2], [0, 1], [0, 2]), masks[1]]) != masks_hash(masks)


@pytest.mark.parametrize(("stage", "changes"), [(None, []), (2, ["processes was 2, is 1"])])
def test_run_settings_have_the_number_of_processes_with_deepspeed(tmp_path, stage, changes):
    model, settings = make_tiny("gqa"), []
    for processes, batch in ((2, 4), (1, 8)):
        flags = ["--model_name_or_path", "model", "--output_dir", str(tmp_path / "out")]
        args = parse_args([*flags, "--per_device_train_batch_size", str(batch)])
        args.training.deepspeed_plugin = stage and SimpleNamespace(zero_stage=stage)
        with patch.object(TrainingArguments, "world_size", processes):
            settings.append(run_settings(args, SimpleNamespace(sha256="0" * 64), model, None, None))
    assert setting_changes(*settings) == changes
