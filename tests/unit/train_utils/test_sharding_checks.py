"""Flags that training on sharded weights refuses."""

import json
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import Seq2SeqTrainingArguments

from slim_utils.common.errors import UserError
from train_utils.finetune_args import TrainingArguments
from train_utils.sharding_checks import check_sharding, zero_stage

ZERO3 = SimpleNamespace(zero_stage=3)


def flags(**changes):
    """Flags of a run with ZeRO-3 in two processes, with ``changes`` by ``GROUP__NAME``."""
    training = {"deepspeed_plugin": ZERO3, "fsdp": None, "fsdp_config": {}, "world_size": 2, "fp16": False}
    training |= {"load_best_model_at_end": False, "auto_find_batch_size": False, "stop_on_held_out": None}
    groups = {
        "training": SimpleNamespace(**training),
        "model": SimpleNamespace(train=None, use_lora=True, peft_lora_bias="none", cache_teacher=0),
        "sparse": SimpleNamespace(is_mask_training=False),
    }
    for name, value in changes.items():
        group, _, key = name.partition("__")
        setattr(groups[group], key, value)
    return SimpleNamespace(**groups)


@pytest.mark.parametrize("sharding", [{}, {"training__deepspeed_plugin": None, "training__fsdp": True}])
@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"sparse__is_mask_training": True}, "--is_mask_training true"),
        ({"model__train": "scales"}, "--train scales"),
        ({"model__peft_lora_bias": "all"}, "--peft_lora_bias all"),
        ({"training__fp16": True}, "--fp16 true"),
        ({"training__load_best_model_at_end": True}, "--load_best_model_at_end true"),
        ({"training__auto_find_batch_size": True}, "--auto_find_batch_size true"),
        ({"training__stop_on_held_out": True}, "--stop_on_held_out true"),
        ({"model__cache_teacher": 64}, "--cache_teacher 64"),
    ],
)
def test_check_sharding_with_an_excluded_flag_names_it(sharding, change, flag):
    check_sharding(flags(**sharding))
    check_sharding(flags(**change, training__deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    with pytest.raises(UserError, match=f"^{flag} does not work on sharded weights") as error:
        check_sharding(flags(**sharding, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training__world_size": 1}, "--fsdp: needs several processes"),
        ({"training__fsdp_config": {"version": 1}}, "--fsdp_config: version 1"),
        ({"training__fsdp_config": {"activation_checkpointing": True}}, "use --gradient_checkpointing true"),
    ],
)
def test_check_sharding_with_unsupported_fsdp_settings_names_them(change, message):
    with pytest.raises(UserError, match=message):
        check_sharding(flags(training__deepspeed_plugin=None, training__fsdp=True, **change))


def test_check_sharding_under_accelerate_launch_names_the_flag(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="start with torchrun and --fsdp true"):
        check_sharding(flags(training__deepspeed_plugin=None))


@pytest.mark.parametrize(("plugin", "stage"), [(None, None), (SimpleNamespace(zero_stage=2), 2), (ZERO3, 3)])
def test_zero_stage_is_that_of_deepspeed(plugin, stage):
    assert zero_stage(flags(training__deepspeed_plugin=plugin).training) == stage


@pytest.mark.parametrize(("on_gpu", "offload"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("form", ["file", "json", "dict"])
def test_training_arguments_with_weights_in_host_memory_add_a_backend_for_them(tmp_path, on_gpu, offload, form):
    config = {"cpu_offload": offload}
    (tmp_path / "fsdp.json").write_text(json.dumps(config))
    value = {"file": str(tmp_path / "fsdp.json"), "json": json.dumps(config), "dict": config}[form]
    # Without setting up devices.
    with (
        patch.object(torch.accelerator, "is_available", lambda: on_gpu),
        patch.object(torch.cuda, "is_available", lambda: on_gpu),
        patch.object(Seq2SeqTrainingArguments, "__post_init__", lambda self: None),
    ):
        backend = TrainingArguments(output_dir="out", fsdp="true", fsdp_config=value).ddp_backend
        assert TrainingArguments(output_dir="out", fsdp_config=value).ddp_backend is None
        older = TrainingArguments(output_dir="out", fsdp="full_shard offload" if offload else "full_shard")
        assert older.ddp_backend == backend
    assert backend == ("cuda:nccl,cpu:gloo" if on_gpu and offload else None)
