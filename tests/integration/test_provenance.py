"""Base, pruning steps, recovery steps and licence of a model, in the files of all models made from it."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM

import model_slimming
from slim_utils.common.ngrams import NgramSample
from slim_utils.families import layer_shapes
from slim_utils.masks import read_units
from slim_utils.output.provenance import calibration_ngrams, read_provenance, total_share_removed
from tests.integration.finetuning import main as finetune
from tests.tiny_models import make_tiny

BASE_CARD = "---\nlicense: other\nlicense_name: tiny\nlanguage: en\n---\n# Tiny\n"


@pytest.fixture
def base(tmp_path, tokenizer) -> Path:
    """A model with a card and a licence."""
    path = tmp_path / "tiny-model"
    make_tiny("gqa").save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text(BASE_CARD)
    (path / "LICENSE.txt").write_text("the licence")
    return path


@pytest.fixture
def prune(text_file):
    """Function that prunes a model into a folder."""

    def prune(model: Path, out: Path, *flags: object) -> None:
        argv = [model, "--data_file", text_file, "--num_samples", 8, "--seqlen", 32, "--device", "cpu"]
        argv += ["--save_pruned_weights", "--skip_evaluate", "--save_dir", out, *flags]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))

    return prune


def block_weights(path: Path) -> int:
    """Number of block weights of a LLaMA with hidden size 24 and head size 4."""
    shapes = layer_shapes(AutoConfig.from_pretrained(path))
    return sum(24 * (2 * 4 * (shape.num_heads + shape.num_kv_heads) + 3 * shape.ffn_width) for shape in shapes)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_model_card_of_repeated_pruning_and_recovery_has_all_steps(base, prune, argv, tmp_path, stream):
    prune(base, tmp_path / "one", "--sparsity", 0.25, *stream)
    finetune(argv(tmp_path / "one" / "pruned_weights", "--use_lora", "true"))
    fused = tmp_path / "out" / "lora_fused_model"
    prune(fused, tmp_path / "two", "--sparsity", 0.25, *stream)
    again = tmp_path / "two" / "pruned_weights"
    dense = block_weights(base)
    for folder, title, kinds in (
        (tmp_path / "one" / "pruned_weights", "# tiny-model, pruned\n", ["pruning"]),
        (fused, "# tiny-model, pruned and fine-tuned\n", ["pruning", "recovery"]),
        (again, "# tiny-model, pruned and fine-tuned\n", ["pruning", "recovery", "pruning"]),
    ):
        card = ModelCard.load(folder / "README.md")
        share = 1 - block_weights(folder) / dense
        assert title in card.content
        assert f"tiny-model without {100 * share:.1f} % of the weights" in card.content
        assert ("no training" in card.content) == (len(kinds) == 1)
        assert ("in 2 pruning runs" in card.content) == (kinds.count("pruning") == 2)
        assert (card.data.license_name, "That of the base model: tiny." in card.content) == ("tiny", True)
        assert (folder / "LICENSE.txt").read_text() == "the licence"
        config = AutoConfig.from_pretrained(folder)
        provenance = read_provenance(str(folder), config)
        assert [step["kind"] for step in provenance["steps"]] == kinds
        assert total_share_removed(provenance) == pytest.approx(share)
        parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
        assert f"| {provenance['base']['parameters']:,} | {parameters:,} |" in card.content
        for index, shape in enumerate(layer_shapes(config)):
            assert f"| {index} | {shape.num_heads} of 6 | {shape.num_kv_heads} of 2 | {shape.ffn_width} of 40 |" in (
                card.content
            )
        # Safe to publish: no local paths.
        published = card.content + "".join((folder / name).read_text() for name in ("slimgpt.json", "pruning.json"))
        assert str(tmp_path.parent) not in published
        units = read_units(folder / "pruning.json", layer_shapes(config))
        assert (units.model, units.is_dense) == ("tiny-model", True)
    assert "| trained | LoRA adapters of rank 8 on q_proj," in ModelCard.load(again / "README.md").content
    assert "| text | tokens per window | first token | before | after |" in (fused / "README.md").read_text()
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["sizes"]["block_share_removed_in_total"] == pytest.approx(1 - block_weights(again) / dense)
    assert record["sizes"]["block_share_removed"] < record["sizes"]["block_share_removed_in_total"]


def test_model_card_of_mask_training_has_the_share_of_the_masks(base, prune, argv, tmp_path):
    prune(base, tmp_path / "one", "--sparsity", 0.4)
    share = 1 - block_weights(tmp_path / "one" / "pruned_weights") / block_weights(base)
    flags = ["--is_mask_training", "true", "--mask_config_dir", tmp_path / "one", "--overwrite", "true"]
    for model in (tmp_path / "one", base):
        finetune(argv(model, *flags))
        for folder in (tmp_path / "out", tmp_path / "out" / "pruned_weights"):
            card = ModelCard.load(folder / "README.md").content
            assert f"# tiny-model, pruned and fine-tuned\n\ntiny-model without {100 * share:.1f} %" in card
            assert "| pruned weights kept at zero | yes |" in card and "| trained | all weights |" in card
            assert (folder / "LICENSE.txt").is_file()
        assert "| masks | one |" in card or model == tmp_path / "one"
    # A masked model keeps its shapes: pruned again, its removed weights are not counted twice.
    prune(tmp_path / "out", tmp_path / "two", "--sparsity", 0.5)
    pruned = tmp_path / "two" / "pruned_weights"
    share = 1 - block_weights(pruned) / block_weights(base)
    assert f"tiny-model without {100 * share:.1f} % of the weights" in (pruned / "README.md").read_text()


OLD_BASE = {"name": "dense", "parameters": 9, "block_weights": 8, "layers": [[6, 2, 40]] * 4}
OLD_STEP = {"kind": "pruning", "block_weights": 7}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 9}',
        '{"format": 1}',
        json.dumps({"format": 1, "base": OLD_BASE}),
        json.dumps({"format": 1, "base": {"name": "dense", "block_weights": 8}, "steps": [OLD_STEP]}),
        json.dumps({"format": 1, "base": OLD_BASE, "steps": [{"kind": "pruning"}]}),
        json.dumps({"format": 1, "base": OLD_BASE, "steps": [{"kind": "grown"}]}),
    ],
)
def test_read_provenance_of_a_damaged_file_starts_over(base, content, caplog):
    (base / "slimgpt.json").write_text(content)
    provenance = read_provenance(str(base), AutoConfig.from_pretrained(base))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].endswith("its history is dropped")
    assert (provenance["base"]["name"], provenance["steps"]) == ("tiny-model", [])
    assert provenance["base"]["block_weights"] == block_weights(base)


@pytest.mark.parametrize("ngrams", ["abcd", "ä", 5])
def test_calibration_ngrams_of_a_damaged_file_are_left_out(ngrams, caplog):
    steps = [OLD_STEP | {"calibration_ngrams": NgramSample(np.array([7], np.uint64)).text}]
    assert calibration_ngrams({"steps": steps}).hashes.tolist() == [7]
    damaged = [OLD_STEP | {"calibration_ngrams": ngrams}, *steps]
    assert calibration_ngrams({"steps": damaged}).hashes.tolist() == [7]
    assert "slimgpt.json: calibration_ngrams cannot be read" in caplog.text


def test_model_card_of_a_model_with_an_older_record_has_its_steps(base, argv, tmp_path):
    (base / "slimgpt.json").write_text(json.dumps({"format": 1, "base": OLD_BASE, "steps": [OLD_STEP]}))
    finetune(argv(base, "--use_lora", "true"))
    fused = tmp_path / "out" / "lora_fused_model"
    assert "dense without 12.5 % of the weights" in (fused / "README.md").read_text()
    steps = json.loads((fused / "slimgpt.json").read_text())["steps"]
    assert [step["kind"] for step in steps] == ["pruning", "recovery"]


def test_model_card_without_pruning_says_fine_tuned(base, argv, tmp_path):
    finetune(argv(base, "--use_lora", "true"))
    card = (tmp_path / "out" / "lora_fused_model" / "README.md").read_text()
    assert "# tiny-model, fine-tuned\n\ntiny-model, fine-tuned.\n" in card and "SlimGPT]" not in card
