"""Masked routers against logits of −inf, and against the router without the rows of the removed experts."""

from itertools import product

import pytest
import torch

from models.families import FAMILIES
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink, zero_removed
from slim_utils.routers import Router, active_by_layer, active_experts
from tests.tiny_models import EXPERT_GROUPS, FURTHER_FAMILIES, make_tiny

MIXTURES = [("mixtral", {}), ("qwen3_moe", {}), ("qwen3_moe", {"norm_topk_prob": False})]


# Also with routers of other names and outputs, further tensors per expert and other layouts of experts.
FURTHER_MIXTURES = [name for name in FURTHER_FAMILIES if FAMILIES[name].expert_columns_key]
UNGROUPED = {name: {"n_group": 1} for name in ("glm4_moe", "deepseek_v3")}


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
    ("name", "overrides", "kept", "dtype"),
    [
        *product(["mixtral", "qwen3_moe"], [{}], [[0, 1, 3], [2]], [torch.float64, torch.float32, torch.bfloat16]),
        *((name, UNGROUPED.get(name, {}), [0, 1, 3], torch.float32) for name in FURTHER_MIXTURES),
        *((name, groups, [0, 1, 3, 5, 6, 7], torch.float32) for name, groups in EXPERT_GROUPS.items()),
        *((name, groups, [0, 3, 5, 6], torch.float32) for name, groups in EXPERT_GROUPS.items()),
    ],
)
def test_shrink_without_experts_is_a_stock_model_with_the_logits_of_the_masked_model(
    name, overrides, kept, dtype, samples
):
    model = make_tiny(name, dtype, **overrides)
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
        assert not torch.allclose(logits, make_tiny(name, dtype, **overrides)(samples).logits, rtol=1e-2)


def grouped_router(name: str) -> tuple[Router, int]:
    """The first router of a model with two groups of four experts, and the hidden size."""
    model = make_tiny(name, **EXPERT_GROUPS[name])
    family = find_family(model.config)
    layers = zip(family.decoder_layers(model), layer_shapes(model.config), strict=True)
    router = next(Router.of(layer, family) for layer, shape in layers if shape.num_experts)
    assert router.num_groups == family.num_expert_groups(model.config) == 2
    return router, model.config.hidden_size


def chosen_by_reference(name: str, router: Router, hidden: torch.Tensor, removed: list[int]) -> torch.Tensor:
    """The two experts of every token, from the four of the better group, with scores of −inf for removed ones."""
    logits = hidden @ router.module.weight.T
    # DeepSeek V2 rates a group by its best expert, the others by their two best.
    scores, rated = logits, 1
    if name != "deepseek_v2":
        scores, rated = logits.sigmoid() + router.module.e_score_correction_bias, 2
    scores[:, removed] = -torch.inf
    groups = scores.view(-1, 2, 4)
    best = groups.topk(rated).values.sum(-1).argmax(-1)
    return groups[torch.arange(len(hidden)), best].topk(2).indices + 4 * best[:, None]


@pytest.mark.parametrize("removed", [[2, 4], [1, 3, 4, 6]])
@pytest.mark.parametrize("name", EXPERT_GROUPS)
def test_mask_router_of_groups_chooses_among_the_kept_experts_of_the_best_group(name, removed):
    router, size = grouped_router(name)
    hidden = torch.randn(50, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = chosen_by_reference(name, router, hidden, removed)
        assert not torch.equal(expected.sort().values, router.route(hidden)[0].sort().values)
        router.mask(sorted(set(range(8)) - set(removed)))
        assert torch.equal(router.route(hidden)[0].sort().values, expected.sort().values)


@pytest.mark.parametrize("kept", [[0, 1, 2, 4], [4, 5, 6]])
def test_mask_router_to_groups_of_different_sizes_is_refused(kept):
    with pytest.raises(ValueError, match="2 groups with different numbers of experts"):
        grouped_router("deepseek_v3")[0].mask(kept)


@pytest.mark.parametrize(("experts", "active"), [(8, 3), (6, 3), (4, 2)])
def test_active_experts_of_groups_fit_into_those_that_the_router_chooses(experts, active):
    config = make_tiny("deepseek_v3", **EXPERT_GROUPS["deepseek_v3"], num_experts_per_tok=3).config
    assert active_experts(config, FAMILIES["deepseek_v3"], experts) == active


def test_shrink_to_different_numbers_of_experts_is_refused():
    model = make_tiny("mixtral")
    shapes = layer_shapes(model.config)
    masks = expert_masks(shapes[:2], [0, 1]) + expert_masks(shapes[2:], [0, 1, 2])
    with pytest.raises(ValueError, match="layers with 2 and 3 experts"):
        shrink(model, find_family(model.config), masks)
