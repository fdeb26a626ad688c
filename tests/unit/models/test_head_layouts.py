"""Fused maps in every layout of their families, and biases per head: masked = pruned logits, reloaded, pruned again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slim_utils.allocation.budget import layer_units
from slim_utils.allocation.planner import plans_of
from slim_utils.allocation.targets import bytes_of
from slim_utils.common.errors import UserError
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import GQA_UNITS, PruningSettings
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink, zero_removed
from tests.tiny_models import make_tiny

MULTI_QUERY = {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None}
MULTI_HEAD = {**MULTI_QUERY, "multi_query": False}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {}),
    ("falcon", {"alibi": True}),
    ("falcon", {"bias": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", MULTI_QUERY),
    ("falcon", {**MULTI_QUERY, "alibi": True}),
    ("falcon", MULTI_HEAD),
    ("falcon", {**MULTI_HEAD, "alibi": True, "bias": True, "parallel_attn": False}),
    ("gpt_bigcode", {}),
    ("gpt_bigcode", {"multi_query": False}),
    ("codegen", {}),
    ("bloom", {}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("mpt", {}),
]
IDS = [" ".join([name, *overrides]) for name, overrides in LAYOUTS]


def mask_of(index: int, shape: LayerShape) -> LayerMask:
    """A mask of its own for every layer: without some heads of every group, or without a kv group."""
    columns, groups = list(range(index + 1, shape.num_columns)), shape.head_groups
    size = shape.num_heads // groups
    if groups > 1 and shape.head_blocks == 1 and (size == 1 or index % 2):
        return LayerMask.from_groups(shape, [group for group in range(groups) if group != index % groups], columns)
    removed = {group * size + (group + index) % size for group in range(groups)} if size > 1 else set()
    return LayerMask.from_heads(shape, [head for head in range(shape.num_heads) if head not in removed], columns)


def prune(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Mask ``model`` in place; returns its pruned model, saved and reloaded."""
    family, masks = find_family(model.config), [mask_of(*item) for item in enumerate(layer_shapes(model.config))]
    pruned = shrink(model, family, masks)
    zero_removed(model, family, masks)
    pruned.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def difference(first: PreTrainedModel, second: PreTrainedModel, **inputs: torch.Tensor) -> float:
    expected = first(**inputs).logits
    return float((second(**inputs).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("name", "overrides"), LAYOUTS, ids=IDS)
def test_pruned_model_of_every_layout_equals_the_masked_one(name, overrides, samples, tmp_path):
    dense, masked = make_tiny(name, **overrides), make_tiny(name, **overrides)
    pruned = prune(masked, tmp_path / "pruned")
    padding = torch.ones_like(samples)
    padding[0, -4:] = 0
    assert difference(masked, pruned, input_ids=samples) < 1e-5 < 1e-2 < difference(dense, pruned, input_ids=samples)
    # Attention with biases per head of a mask that differs between the samples.
    assert difference(masked, pruned, input_ids=samples, attention_mask=padding) < 1e-5
    # Pruned again, the biases are still those of the dense model's heads.
    assert difference(pruned, prune(pruned, tmp_path / "again"), input_ids=samples) < 1e-5


@pytest.mark.parametrize(("name", "overrides"), LAYOUTS, ids=IDS)
def test_pruned_model_of_every_layout_generates_the_same_with_and_without_cache(name, overrides, samples, tmp_path):
    pruned = prune(make_tiny(name, **overrides), tmp_path)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["attention_mask"] = torch.ones_like(samples[:2, :5])
    cached, plain = (pruned.generate(samples[:2, :5], use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_heads_of_a_model_with_biases_per_head_are_those_of_the_dense_model(tmp_path):
    """Slopes by position among the kept heads would be another model."""
    model = make_tiny("bloom")
    pruned = prune(model, tmp_path / "pruned")
    kept = [layer.kept_heads for layer in pruned.config.per_layer_config]
    assert kept == [[head for head in range(6) if head != index] for index in range(4)]
    again = prune(pruned, tmp_path / "again")
    assert [layer.kept_heads for layer in again.config.per_layer_config] == [
        [2, 3, 4, 5], [0, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 5]
    ]  # fmt: skip
    assert not hasattr(make_tiny("falcon").config.per_layer_config[0], "kept_heads")
    falcon = prune(make_tiny("falcon"), tmp_path / "falcon")
    assert not hasattr(falcon.config.per_layer_config[0], "kept_heads")


def test_from_heads_with_blocks_that_lose_different_numbers_of_heads_is_refused():
    shape = layer_shapes(make_tiny("codegen").config)[0]
    assert (shape.num_heads, shape.head_blocks, shape.head_groups) == (8, 4, 4)
    assert LayerMask.from_heads(shape, [0, 3, 5, 6], [0]).kept_kv_heads == [0, 3, 5, 6]
    for heads in ([0, 1, 3, 5], [0, 1, 2, 3, 4, 5, 6]):
        with pytest.raises(ValueError, match="4 blocks with different numbers of heads"):
            LayerMask.from_heads(shape, heads, [0])


@pytest.mark.parametrize("gqa_unit", GQA_UNITS)
def test_plans_of_a_model_with_blocks_take_a_head_of_every_block(gqa_unit, samples):
    model = make_tiny("codegen")
    settings = PruningSettings(torch.device("cpu"), torch.device("cpu"), gqa_unit=gqa_unit)
    plans = plans_of(model, [0.1, 0.4, 0.6, 0.9], settings)
    assert [plan.heads for plan in plans] == [0, 4, 4, 4]
    masks, _ = prune_layers(model, find_family(model.config), samples, plans, settings)
    assert [mask.plan for mask in masks] == plans
    units = layer_units(
        find_family(model.config).decoder_layers(model), find_family(model.config), layer_shapes(model.config), settings
    )[0]
    # Keys and values of four heads.
    cached = bytes_of(units, layer_shapes(model.config)[0], 10, settings, 4).head_cost - 4 * units.head_cost
    assert cached == 4 * 10 * 2 * 4 * 4


def test_uniform_shapes_of_a_family_with_a_fixed_width_are_refused_once_columns_are_removed():
    model = make_tiny("mpt")
    masks = [LayerMask.from_groups(shape, list(range(6)), list(range(80))) for shape in layer_shapes(model.config)]
    with pytest.raises(UserError, match="--uniform_shapes: a stock mpt has 96 FFN columns"):
        shrink(model, find_family(model.config), masks, uniform_shapes=True)
