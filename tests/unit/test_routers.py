"""Masked routers against logits of −inf, and against the router without the rows of the removed experts."""

from itertools import product

import pytest
import torch

from models.families import FAMILIES
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink, zero_removed
from slim_utils.routers import Router, active_by_layer, active_experts
from tests.tiny_models import FURTHER_FAMILIES, make_tiny

MIXTURES = [("mixtral", {}), ("qwen3_moe", {}), ("qwen3_moe", {"norm_topk_prob": False})]


# Also with routers of other names and outputs, further tensors per expert and other layouts of experts.
FURTHER_MIXTURES = [name for name in FURTHER_FAMILIES if FAMILIES[name].expert_columns_key]


def expert_masks(shapes, kept: list[int]) -> list[LayerMask]:
    """Masks that keep the same experts of every MoE layer, and all else."""
    masks = []
    for shape in shapes:
        experts = kept if shape.num_experts else [0]
        columns = [index * shape.ffn_width + i for index in experts for i in range(shape.ffn_width)]
        masks.append(LayerMask.from_groups(shape, list(range(shape.num_kv_heads)), columns))
    return masks


@pytest.mark.parametrize("kept", [[0, 1, 3], [1, 2], [2]])
@pytest.mark.parametrize(("name", "overrides"), MIXTURES)
def test_mask_router_is_the_top_k_of_logits_with_minus_infinity(name, overrides, kept):
    model = make_tiny(name, **overrides)
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense_logits = router(hidden)[0]
        Router(router).mask(kept)
        logits, weights, indices = router(hidden)
    removed = sorted(set(range(4)) - set(kept))
    expected = dense_logits.index_fill(1, torch.tensor(removed), -torch.inf).softmax(-1)
    values, chosen = expected.topk(min(2, len(kept)), dim=-1)
    if overrides.get("norm_topk_prob", True):
        values = values / values.sum(dim=-1, keepdim=True)
    assert torch.equal(indices, chosen) and torch.allclose(weights, values, rtol=1e-5)
    assert (logits[:, removed] == -torch.inf).all() and torch.allclose(
        logits[:, kept], dense_logits[:, kept], atol=1e-6
    )


def test_mask_router_again_or_with_all_experts_replaces_the_mask():
    router, hidden = make_tiny("mixtral").model.layers[0].mlp.gate, torch.randn(9, 24)
    with torch.no_grad():
        dense = router(hidden)
        Router(router).mask([0, 1])
        Router(router).mask([2, 3])
        assert set(router(hidden)[2].flatten().tolist()) == {2, 3}
        Router(router).mask([0, 1, 2, 3])
        assert all(torch.equal(*pair) for pair in zip(router(hidden), dense, strict=True))
    assert active_experts(make_tiny("mixtral").config, FAMILIES["mixtral"], 1) == 1


def test_masked_router_runs_its_hooks_once_on_the_logits_of_all_experts(samples):
    model = make_tiny("mixtral", output_router_logits=True)
    for layer in model.model.layers:
        Router(layer.mlp.gate).mask([0, 2])
    with torch.no_grad():
        output = model(samples)
    assert len(output.router_logits) == 4 and all(logits.shape[-1] == 4 for logits in output.router_logits)
    assert output.aux_loss.isfinite()


@pytest.mark.parametrize(
    ("name", "kept", "dtype"),
    [
        *product(["mixtral", "qwen3_moe"], [[0, 1, 3], [2]], [torch.float64, torch.float32, torch.bfloat16]),
        *product(FURTHER_MIXTURES, [[0, 1, 3]], [torch.float32]),
    ],
)
def test_shrink_without_experts_is_a_stock_model_with_the_logits_of_the_masked_model(name, kept, dtype, samples):
    ungrouped = {"n_group": 1} if name in ("glm4_moe", "deepseek_v3") else {}
    model = make_tiny(name, dtype, **ungrouped)
    family = find_family(model.config)
    masks = expert_masks(layer_shapes(model.config), kept)
    zero_removed(model, family, masks)
    pruned = shrink(model, family, masks, uniform_shapes=True)
    assert type(pruned) is type(model) and pruned.config.model_type == name
    assert {shape.num_experts for shape in layer_shapes(pruned.config)} <= {0, len(kept)}
    assert set(active_by_layer(pruned.config)) == {min(2, len(kept))}
    assert set(active_by_layer(model.config)) == {2}
    with torch.no_grad():
        expected, logits = model(samples).logits, pruned(samples).logits
    assert logits.dtype == dtype
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    # Not the dense model's: the mask matters.
    with torch.no_grad():
        assert not torch.allclose(logits, make_tiny(name, dtype, **ungrouped)(samples).logits, rtol=1e-2)


def test_shrink_to_different_numbers_of_experts_is_refused():
    model = make_tiny("mixtral")
    shapes = layer_shapes(model.config)
    masks = expert_masks(shapes[:2], [0, 1]) + expert_masks(shapes[2:], [0, 1, 2])
    with pytest.raises(ValueError, match="layers with 2 and 3 experts"):
        shrink(model, find_family(model.config), masks)
