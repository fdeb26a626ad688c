"""Targets in multiply-accumulates and bytes: their costs against the sizes of pruned models, and their flags."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from slim_utils.allocation.budget import cost_removed, layer_units
from slim_utils.allocation.targets import cached_tokens, measured_size, parse_size, target_of
from slim_utils.common.errors import UserError
from slim_utils.common.loading import model_on_meta
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.pruned_config import slim_config
from slim_utils.pruning_config import PruningConfig
from tests.tiny_models import ALL_TINY, make_tiny
from tests.unit.allocation.slimming import main

CPU = torch.device("cpu")
MEMORY = PruningConfig(target_memory="0.9x", at_context=300, at_batch=3)
MACS = PruningConfig(target_macs="0.9x")


# Also shared experts, experts that all run on every token or work on latents, and latent attention.
FURTHER = ["qwen2_moe", "llama4_text", "deepseek_v3", "nemotron_h with latent experts"]


@pytest.mark.parametrize("variant", [*ALL_TINY, *FURTHER])
@pytest.mark.parametrize("unit", ["query_head", pytest.param("kv_group", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [MACS, MEMORY], ids=["macs", "memory"])
def test_cost_of_units_is_what_the_pruned_model_saves(variant, unit, config):
    model = make_tiny(variant)
    family, shapes = find_family(model.config), layer_shapes(model.config)
    settings = PruningSettings(CPU, CPU, gqa_unit=unit)
    units = layer_units(family.decoder_layers(model), family, shapes, settings)
    target = target_of(config, model, units, settings)
    dense = measured_size(config, model.config)
    assert target.dense == dense and target.budget == pytest.approx(0.1 * dense)
    counts = [[min(index + 1, layer.heads - 1), 2 * index + 1] for index, layer in enumerate(units)]
    plans = [layer.plan(*pair) for layer, pair in zip(units, counts, strict=True)]
    masks = [settings.size_mask(shape, plan) for shape, plan in zip(shapes, plans, strict=True)]
    pruned = slim_config(model.config, family, masks)
    # Biases and norms are not block weights.
    vectors = 0 if config is MACS else 4 * (vector_size(model.config) - vector_size(pruned))
    assert dense - measured_size(config, pruned) - vectors == cost_removed(counts, target.units)


def vector_size(config) -> int:
    """Entries of all biases and norms."""
    return sum(parameter.numel() for parameter in model_on_meta(config).parameters() if parameter.ndim == 1)


def test_cached_tokens_of_sliding_layers_are_those_of_the_window():
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    gemma = AutoConfig.for_model("gemma3_text", sliding_window=100, **layers)
    assert cached_tokens(MEMORY, gemma) == [300, 900, 300]
    assert cached_tokens(replace(MEMORY, at_context=50), gemma) == [150, 150, 150]
    mistral = AutoConfig.for_model("mistral", sliding_window=100, num_hidden_layers=2)
    assert cached_tokens(MEMORY, mistral) == [300, 300]
    mistral.sliding_window = None
    assert cached_tokens(MEMORY, mistral) == [900, 900]
    qwen = AutoConfig.for_model("qwen2", sliding_window=100, use_sliding_window=False, num_hidden_layers=2)
    assert cached_tokens(MEMORY, qwen) == [900, 900]


@pytest.mark.parametrize(
    ("flag", "text", "value", "is_share"),
    [
        ("--target_memory", "6GiB", 6 * 2**30, False),
        ("--target_memory", "1.5 gb", 1.5e9, False),
        ("--target_memory", "800MB", 8e8, False),
        ("--target_memory", "0.8x", 0.8, True),
        ("--target_macs", "3.2G", 3.2e9, False),
        ("--target_macs", "3.2e9", 3.2e9, False),
        ("--target_macs", "0.5X", 0.5, True),
    ],
)
def test_parse_size(flag, text, value, is_share):
    size = parse_size(flag, text)
    assert (size.value, size.is_share) == (value, is_share)
    assert size.of(100.0) == (100 * value if is_share else value)


@pytest.mark.parametrize(
    ("flags", "allocation"),
    [
        (["--target_macs", "0.8x"], "log_increase"),
        (["--target_memory", "0.85x", "--at_context", 64, "--gqa_unit", "kv_group"], "search"),
    ],
    ids=["macs", "memory"],
)
def test_target_size_is_met(words, checkpoint, tmp_path, flags, allocation, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    main(*words, *flags, "--allocation", allocation, "--save_pruned_weights", "--save_dir", out)
    config = replace(PruningConfig(at_context=64), **{flags[0].removeprefix("--"): flags[1]})
    dense, pruned = (
        measured_size(config, AutoConfig.from_pretrained(path)) for path in (checkpoint, out / "pruned_weights")
    )
    share = float(flags[1].removesuffix("x"))
    # A column has 3 · 24 weights.
    assert share * dense - 3 * 24 * 64 < pruned <= share * dense
    line = next(message for message in caplog.messages if message.startswith("target: "))
    ending = f", {pruned / dense:.4f} of the model's (requested: {share:.4f})"
    assert line.endswith(ending)
    assert any(message.startswith("pruned model: ") and message.endswith(ending) for message in caplog.messages)
    card, record = (out / "pruned_weights" / "README.md").read_text(), json.loads((out / "run.json").read_text())
    assert flags[1] in card and f"; {pruned / dense:.4f} of the model's achieved |" in card
    assert record["arguments"][flags[0].removeprefix("--")] == flags[1]
    # Counted on the saved model.
    assert record["target"] == {"flag": flags[0], "dense": dense, "requested": share * dense, "achieved": pruned}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_macs", "fast"], "--target_macs fast: give a size such as 3.2G, or a share"),
        (["--target_macs", "1.2x"], "--target_macs 1.2x: above 0 and below 1"),
        (["--target_macs", "0"], "--target_macs 0: above 0"),
        (["--target_macs", "6GiB"], "--target_macs 6GiB: give a size such as 3.2G"),
        (["--target_memory", "6"], "--target_memory 6: give a size such as 6GiB"),
        (["--target_memory", "1..2GB"], "--target_memory 1..2GB: give a size"),
        (
            ["--target_memory", "6GiB"],
            "--target_memory 6GiB: the model has .* GiB of weights and KV cache for 1 × 4096",
        ),
        (["--target_macs", "5T"], "--target_macs 5T: the model has .* G multiply-accumulates for 64 tokens"),
        (["--target_macs", "0.01x"], "of what the target removes can be removed; .*--target_macs"),
        (["--target_macs", "0.8x", "--target_ratio", 0.2], "--target_ratio and --target_macs exclude each other"),
        (["--target_memory", "0.8x", "--sparsity", 0.2], "--target_memory sets the ratios; leave --sparsity out"),
        (["--target_memory", "0.8x", "--at_context", 0], "--at_context 0: at least 1"),
        (["--target_memory", "0.8x", "--at_batch", 0], "--at_batch 0: at least 1"),
        (
            ["--target_macs", "0.8x", "--at_batch", 2],
            "--at_batch is a part of --target_memory or --target_latency; add it",
        ),
    ],
)
def test_target_size_with_wrong_flags_is_refused(words, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main(*words, *flags, "--save_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
