"""Pruned models whose last layers reuse keys and values, with caches, padding and parts of the logits."""

import pytest
import torch
from transformers import PreTrainedModel

from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.tiny_models import make_tiny

NAMES = ["gemma4_text of inputs by layer", "gemma4_text of inputs by layer with experts"]


def pruned(name: str) -> PreTrainedModel:
    """A model without some query heads and columns of every layer, as many as its index."""
    model = make_tiny(name)
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        size = shape.heads_per_group
        heads = [head for head in range(shape.num_heads) if head % size >= index % size]
        columns = [column for column in range(shape.num_columns) if column % shape.ffn_width >= index]
        masks.append(LayerMask.from_heads(shape, heads, columns))
    return shrink(model, find_family(model.config), masks).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_left_padding_does_not_change_the_logits(name, samples):
    model, padding = pruned(name), 3
    padded = torch.cat([torch.zeros(len(samples), padding, dtype=torch.long), samples], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(samples).logits
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, padding:]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_the_same_with_every_cache(name, samples):
    model, options = pruned(name), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(samples[:2], use_cache=False, **options)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(samples[:2], cache_implementation=cache, **options), expected), cache


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_last_logits_alone_are_those_of_all(name, samples):
    """The library then runs the last layers on the last tokens alone."""
    model = pruned(name)
    expected = model(samples).logits[:, -2:]
    logits = model(samples, logits_to_keep=2).logits
    assert logits.shape == expected.shape and (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_layers_that_share_keys_have_no_smaller_cache_and_those_that_reuse_them_none(samples):
    model = pruned(NAMES[0])
    shapes = layer_shapes(model.config)
    assert [shape.kv_sharing for shape in shapes] == ["store", "store", "reuse", "reuse"]
    assert [shape.cached_values for shape in shapes] == [2 * 2 * 4, 2 * 2 * 8, 0, 0]
    cache = model(samples, use_cache=True).past_key_values
    stored = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert sum(2 * keys[0, :, 0].numel() for keys in stored) == sum(shape.cached_values for shape in shapes)


def test_uniform_shapes_of_one_width_are_a_stock_model_without_double_width():
    model = make_tiny(NAMES[0])
    shapes = layer_shapes(model.config)
    masks = [LayerMask.from_heads(shape, list(range(shape.num_heads)), list(range(27))) for shape in shapes]
    stock = shrink(model, find_family(model.config), masks, uniform_shapes=True)
    assert not stock.config.use_double_wide_mlp
    assert [shape.num_columns for shape in layer_shapes(stock.config)] == [27] * 4
