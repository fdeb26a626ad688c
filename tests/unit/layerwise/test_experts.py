"""Experts as linear maps of their own: their inputs, their Hessians, and what happens to those that see few tokens."""

import logging

import pytest
import torch

from slim_utils.allocation.planner import plans_of
from slim_utils.families import SHARED_COLUMNS, find_family, layer_shapes
from slim_utils.layerwise.experts import (
    Experts,
    expert_inputs,
    expert_linear,
    expert_maps,
    result_of_experts,
    tokens_of_expert,
)
from slim_utils.layerwise.output_maps import OutputMaps
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.routers import Router
from slim_utils.slimgpt import PruneResult
from tests import reference_slimgpt
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")


def some_calls(experts, counts: list[int]):
    """One batch in which expert ``i`` gets ``counts[i]`` tokens, one expert a token."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    hidden = torch.randn(len(chosen), experts.down_proj.shape[1], generator=generator, dtype=torch.float64)
    weights = torch.rand(len(chosen), 1, generator=generator, dtype=torch.float64)
    return hidden, chosen[:, None], weights


def prune_experts(experts, name: str, calls, count: int, settings: PruningSettings) -> PruneResult:
    """Remove ``count`` columns of every expert."""
    maps = OutputMaps(name, expert_maps(Experts(experts), name, calls), [experts.down_proj.data])
    return result_of_experts(maps.prune(count, settings))


def tiny_experts(name: str = "mixtral"):
    """The experts of one layer, in float64: four, of 40 columns on a hidden size of 24."""
    return make_tiny(name, torch.float64).model.layers[0].mlp.experts


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "gemma4_text", "nemotron_h with latent experts"]
)
def test_the_experts_outputs_are_linear_in_these_inputs_but_for_biases(name, samples):
    model = make_tiny(name, torch.float64)
    family, layer, seen = find_family(model.config), model.model.layers[3], {}
    router = Router.of(layer, family)
    router.module.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    layer.get_submodule(family.experts).register_forward_hook(lambda module, args, output: seen.update(output=output))
    experts = Experts.of(layer, family)
    with torch.no_grad():
        model(samples)
        hidden, output = seen["hidden"].flatten(end_dim=-2), seen["output"]
        chosen, weights = router.route(hidden)
        total = torch.zeros_like(output.view(-1, len(hidden), output.shape[-1])[0])
        for index in range(4):
            routed = tokens_of_expert(experts, index, hidden, chosen, weights)
            total.index_add_(0, routed.token, (routed.inputs.double() @ experts.down_proj[index].T).to(total))
            if routed.bias is not None:
                total.index_add_(0, routed.token, routed.bias.to(total))
    # Those of LLaMA 4 run every expert on every token.
    output = output.view(-1, *total.shape).sum(0)
    assert torch.allclose(total, output, rtol=1e-6, atol=1e-6 * output.abs().max().item())


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4_text", "granitemoehybrid", "gemma4_text"])
def test_prune_layers_shared_expert_loses_columns_by_its_gated_inputs(name, samples):
    model, dense = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    family, layer, seen = find_family(model.config), dense.model.layers[3], {}
    plans = [LayerPlan()] * 3 + [LayerPlan(columns=8)]
    masks, reports = prune_layers(model, family, samples, plans, PruningSettings(CPU, CPU))
    down_proj = layer.get_submodule(family.shared_map)
    down_proj.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0]))
    if family.shared_gate:
        gate = layer.get_submodule(family.shared_gate)
        gate.register_forward_hook(lambda module, args, output: seen.update(gate=output))
    with torch.no_grad():
        dense(samples)
    inputs = seen["inputs"] * seen["gate"].sigmoid() if family.shared_gate else seen["inputs"]
    hessian = reference_slimgpt.hessian_of(inputs[None])
    share = {"qwen2_moe": 0.5, "llama4_text": 0.5}.get(name, 0.4)
    expected, removed = reference_slimgpt.struct_prune(down_proj.weight.data, hessian, share, percdamp=0.01)
    # Two columns with one of each expert: 16 of 32 and of 40; one in LLaMA 4.
    assert len(removed) == {"llama4_text": 8}.get(name, 16)
    assert masks[3].removed_units()[SHARED_COLUMNS] == removed
    weight = model.model.layers[3].get_submodule(family.shared_map).weight
    assert torch.allclose(weight, expected, rtol=1e-4, atol=1e-4)
    total = down_proj.in_features
    line = f"shared expert −{len(removed)}/{total} error {reports[0].shared.error_uncompensated:.2e}"
    assert line in reports[0].log_line(4)


def test_shared_expert_that_is_narrower_than_an_expert_is_left_as_it_is(samples):
    model = make_tiny("qwen2_moe", shared_expert_intermediate_size=12)
    family, plans = find_family(model.config), [LayerPlan()] * 3 + [LayerPlan(columns=8)]
    masks, reports = prune_layers(model, family, samples, plans, PruningSettings(CPU, CPU))
    assert masks[3].kept_shared == list(range(12)) and reports[0].shared is None
    assert "shared expert −0/12" in reports[0].log_line(4)


def test_an_experts_linear_map_is_its_slice():
    experts = tiny_experts()
    linear = expert_linear(Experts(experts), 2)
    with torch.no_grad():
        linear.weight[:, 5] = 7
    assert (linear.in_features, linear.out_features) == (40, 24)
    assert (experts.down_proj[2, :, 5] == 7).all() and not (experts.down_proj[1] == 7).any()


def test_every_expert_by_its_own_tokens():
    experts, dense = tiny_experts(), tiny_experts()
    calls = some_calls(experts, [60, 50, 45, 70])
    result = prune_experts(experts, "experts", [calls], 12, PruningSettings(CPU, CPU))
    for index, inputs in expert_inputs(Experts(dense), *calls):
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


def test_error_curve_of_experts_is_the_error_of_their_outputs():
    """Of 12 columns less, over all tokens; the expert without tokens adds nothing."""
    experts, dense, columns = tiny_experts(), tiny_experts(), 12
    calls = some_calls(experts, [60, 50, 45, 0])
    settings = PruningSettings(CPU, CPU, percdamp=1e-9)
    maps = OutputMaps("experts", expert_maps(Experts(experts), "experts", [calls]), [experts.down_proj.data])
    errors = maps.error_curve(columns, settings, steps=1)
    assert torch.equal(experts.down_proj, dense.down_proj) and len(errors) == columns + 1
    maps.prune(columns, settings)
    total = 0.0
    for index, inputs in expert_inputs(Experts(dense), *calls):
        total += (inputs @ (experts.down_proj[index] - dense.down_proj[index]).T).square().sum().item()
    # The Hessian is that of one batch, with the factor 2, as a mean over the experts with tokens.
    assert errors[columns].item() == pytest.approx(2 * total / 3, rel=1e-3)


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
