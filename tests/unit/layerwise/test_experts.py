"""Experts as linear maps of their own: their inputs, their Hessians, and what happens to those that see few tokens."""

import logging

import pytest
import torch

from slim_utils.allocation.planner import plans_of
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.experts import expert_inputs, expert_linear, prune_experts
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask
from tests import reference_slimgpt
from tests.conftest import make_tiny

CPU = torch.device("cpu")


def some_calls(experts, counts: list[int]):
    """One batch in which expert ``i`` gets ``counts[i]`` tokens, one expert a token."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    hidden = torch.randn(len(chosen), experts.down_proj.shape[1], generator=generator, dtype=torch.float64)
    weights = torch.rand(len(chosen), 1, generator=generator, dtype=torch.float64)
    return hidden, chosen[:, None], weights


def tiny_experts(name: str = "mixtral"):
    """The experts of one layer, in float64: four, of 40 columns on a hidden size of 24."""
    return make_tiny(name, torch.float64).model.layers[0].mlp.experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_experts_outputs_are_linear_in_these_inputs(name, samples):
    model = make_tiny(name, torch.float64)
    experts, seen = model.model.layers[0].mlp.experts, []
    experts.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    with torch.no_grad():
        model(samples)
        (hidden, chosen, weights), output = seen[0]
        total = torch.zeros_like(output)
        for index, inputs in expert_inputs(experts, hidden, chosen, weights):
            token = torch.where(chosen == index)[0]
            total.index_add_(0, token, inputs.to(output.dtype) @ experts.down_proj[index].T)
    assert torch.allclose(total, output, rtol=1e-6, atol=1e-6 * output.abs().max().item())


def test_an_experts_linear_map_is_its_slice():
    experts = tiny_experts()
    linear = expert_linear(experts, 2)
    with torch.no_grad():
        linear.weight[:, 5] = 7
    assert (linear.in_features, linear.out_features) == (40, 24)
    assert (experts.down_proj[2, :, 5] == 7).all() and not (experts.down_proj[1] == 7).any()


def test_every_expert_by_its_own_tokens():
    experts, dense = tiny_experts(), tiny_experts()
    calls = some_calls(experts, [60, 50, 45, 70])
    result = prune_experts(experts, "experts", [calls], 12, PruningSettings(CPU, CPU))
    for index, inputs in expert_inputs(dense, *calls):
        hessian = reference_slimgpt.hessian_of(inputs[None])
        expected, removed = reference_slimgpt.struct_prune(dense.down_proj[index].data, hessian, 0.3, percdamp=0.01)
        assert [u - 40 * index for u in result.pruned_units if u // 40 == index] == removed
        assert torch.allclose(experts.down_proj[index], expected, rtol=1e-4, atol=1e-4)
    assert len(result.pruned_units) == 4 * 12
    assert 0 < result.error_compensated < result.error_uncompensated


@pytest.mark.parametrize("count", [0, 12])
def test_prune_experts_dead_columns_of_kept_units_keep_their_weights(count):
    experts, dense = tiny_experts(), tiny_experts()
    dead = list(range(4, 24))
    for module in (experts, dense):
        module.gate_up_proj.data[1, dead] = 0
    calls = some_calls(experts, [60, 50, 45, 70])
    result = prune_experts(experts, "experts", [calls], count, PruningSettings(CPU, CPU))
    kept = [unit - 40 for unit in result.kept_units if unit // 40 == 1]
    assert len(kept) == 40 - count
    kept_dead = sorted(set(kept) & set(dead))
    assert kept_dead and torch.equal(experts.down_proj[1][:, kept_dead], dense.down_proj[1][:, kept_dead])
    assert torch.equal(experts.down_proj, dense.down_proj) == (count == 0)


def test_batches_add_up():
    whole, parts = tiny_experts(), tiny_experts()
    calls = some_calls(whole, [60, 50, 45, 70])
    expected = prune_experts(whole, "experts", [calls], 12, PruningSettings(CPU, CPU))
    split = [tuple(tensor[start::3] for tensor in calls) for start in range(3)]
    assert prune_experts(parts, "experts", split, 12, PruningSettings(CPU, CPU)).pruned_units == expected.pruned_units


def test_experts_that_saw_few_tokens_are_damped_and_reported(caplog):
    experts, dense = tiny_experts(), tiny_experts()
    calls = some_calls(experts, [60, 0, 3, 39])
    with caplog.at_level(logging.WARNING):
        result = prune_experts(experts, "layer 4 experts", [calls], 20, PruningSettings(CPU, CPU))
    assert caplog.messages == [
        "layer 4 experts: under-calibrated, fewer tokens than the 40 columns: experts 1 (0), 2 (3), 3 (39); percdamp "
        "raised to 1; raise --num_samples"
    ]
    assert experts.down_proj.isfinite().all()
    assert result.percdamp == 1
    assert LayerMask(
        layer_shapes(make_tiny("mixtral").config)[0], list(range(6)), [0, 1], result.kept_units
    ).columns_by_ffn()
    # Of the one without tokens the smallest columns go, and the others stay as they are.
    norms = dense.down_proj[1].norm(dim=0)
    gone = [unit - 40 for unit in result.pruned_units if unit // 40 == 1]
    assert sorted(gone) == sorted(norms.argsort()[:20].tolist())
    kept = sorted(set(range(40)) - set(gone))
    assert torch.equal(experts.down_proj[1][:, kept], dense.down_proj[1][:, kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_model_most_of_whose_experts_starve_stays_finite(name, dtype, samples):
    model = make_tiny(name, dtype)
    # The router prefers one expert and never takes the last.
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.weight.zero_()
    settings = PruningSettings(CPU, CPU, percdamp=0.0)
    plans = plans_of(model, [0.5] * 4, settings)
    masks, reports = prune_layers(model, find_family(model.config), samples[:1], plans, settings)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(report.mlp.error_compensated <= report.mlp.error_uncompensated for report in reports)
    for mask in masks:
        kept = {len(columns) for columns in mask.columns_by_ffn()}
        assert kept <= ({8, 16, 24} if mask.shape.num_experts else {20}) and len(kept) == 1


def test_experts_keep_equally_many_columns():
    shape = layer_shapes(make_tiny("mixtral").config)[0]
    assert (shape.num_columns, shape.num_experts, shape.ffn_width) == (160, 4, 40)
    with pytest.raises(ValueError, match="experts with different numbers of columns"):
        LayerMask.from_groups(shape, [0], [1, 41, 81, 121, 122])


def test_layers_without_experts_are_ordinary():
    shapes = layer_shapes(make_tiny("qwen3_moe").config)
    assert [(shape.num_columns, shape.num_experts) for shape in shapes] == [(80, 4), (40, 0), (80, 4), (80, 4)]
    sparse_step = make_tiny("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)
    assert [shape.num_experts for shape in layer_shapes(sparse_step.config)] == [0, 4, 0, 4]
