"""Removal of whole experts: scores, chosen subsets and the refit against brute force in float64."""

from itertools import combinations

import pytest
import torch

from slim_utils.common.errors import UserError
from slim_utils.families import find_family
from slim_utils.layerwise import whole_experts
from slim_utils.layerwise.experts import Experts, tokens_of_expert
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.layerwise.whole_experts import lowest, prune_whole_experts
from slim_utils.masks import LayerPlan
from slim_utils.routers import Router
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
SETTINGS = PruningSettings(CPU, CPU, whole_experts=True)
SEQLEN, NUM_TOKENS = 20, 2000


def moe_layer(name: str = "mixtral", dtype: torch.dtype = torch.float64, **overrides):
    """The MoE block of one layer: four experts of 40 columns (Mixtral) on a hidden size of 24."""
    block = make_tiny(name, dtype, **overrides).model.layers[0].mlp
    return block.experts, block.gate


def hidden_inputs(seed: int = 3) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def prune(experts, router, count: int, settings: PruningSettings = SETTINGS, hidden=None, parts: int = 3):
    """Prune on ``hidden``, in several batches of whole samples."""
    hidden = hidden_inputs() if hidden is None else hidden
    calls = []
    for batch in hidden.split(len(hidden) // SEQLEN // parts * SEQLEN):
        _, weights, indices = router(batch)
        calls.append(((batch, indices, weights), SEQLEN))
    return prune_whole_experts(Experts(experts), Router(router), "experts", calls, count, settings)


@torch.no_grad()
def output(experts, router, hidden: torch.Tensor, kept: list[int] | None = None) -> torch.Tensor:
    """The block's output, of all experts on all tokens, with logits of −inf for experts that are not in ``kept``."""
    logits = hidden @ router.weight.T
    if kept is not None:
        logits[:, sorted(set(range(4)) - set(kept))] = -torch.inf
    values, chosen = logits.float().softmax(1).topk(min(router.top_k, len(kept or range(4))))
    gates = torch.zeros_like(logits).scatter(1, chosen, (values / values.sum(dim=1, keepdim=True)).double())
    gate, up = torch.einsum("eci,ti->tec", experts.gate_up_proj, hidden).chunk(2, dim=-1)
    return torch.einsum("te,eoc,tec->to", gates, experts.down_proj, experts.act_fn(gate) * up)


def error(dense: torch.Tensor, pruned: torch.Tensor) -> float:
    return ((dense - pruned).square().sum() / dense.square().sum()).item()


def held_out() -> torch.Tensor:
    """Tokens of the held-out samples: the second of every five."""
    return torch.arange(NUM_TOKENS) // SEQLEN % 5 == 1


def test_scores_are_the_mean_of_gate_times_norm_over_routed_tokens():
    experts, router = moe_layer()
    hidden, sums, counts = hidden_inputs(), torch.zeros(4), torch.zeros(4)
    with torch.no_grad():
        for x in hidden:
            values, chosen = (router.weight @ x).float().softmax(0).topk(2)
            for value, index in zip(values / values.sum(), chosen.tolist(), strict=True):
                gate, up = (experts.gate_up_proj[index] @ x).chunk(2)
                sums[index] += value * (experts.down_proj[index] @ (experts.act_fn(gate) * up)).norm()
                counts[index] += 1
    result, report = prune(experts, router, 1)
    assert report.scores == pytest.approx((sums / counts).tolist(), rel=1e-5)
    assert report.removed == [int((sums / counts).argmin())]
    assert result.pruned_units == list(range(40 * report.removed[0], 40 * (report.removed[0] + 1)))


def test_lowest_of_equal_scores_is_the_first_and_experts_without_tokens_go_before_others():
    assert lowest(torch.tensor([0.5, 0.0, 0.2, 0.2]), 2) == [1, 2]
    assert lowest(torch.tensor([0.5, 0.0, 0.1, 0.3, 0.2, 0.2]), 2, groups=2) == [1, 4]
    with pytest.raises(ValueError, match="3 experts of 2 groups"):
        lowest(torch.rand(6), 3, groups=2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_error_of_the_chosen_subset_is_that_of_brute_force_and_for_one_expert_the_least(count):
    experts, router = moe_layer()
    experts.down_proj.data *= torch.tensor([0.3, 1.0, 0.03, 3.0], dtype=torch.float64)[:, None, None]
    hidden = hidden_inputs()[:200]
    dense = output(experts, router, hidden)
    errors = {
        kept: error(dense, output(experts, router, hidden, list(kept))) for kept in combinations(range(4), 4 - count)
    }
    result, report = prune(experts, router, count, hidden=hidden)
    kept = tuple(sorted(set(range(4)) - set(report.removed)))
    # Scores do not see what the remaining experts do to the tokens of several others.
    assert count > 1 or kept == min(errors, key=errors.get)
    assert result.error_uncompensated == pytest.approx(errors[kept], rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("removed", list(combinations(range(4), 2)))
def test_refit_of_every_subset_lowers_the_error_of_calibration_and_held_out_samples(name, removed, monkeypatch):
    monkeypatch.setattr(whole_experts, "lowest", lambda *_: list(removed))
    experts, router = moe_layer(name)
    hidden = hidden_inputs()
    dense = output(experts, router, hidden[:200])
    result, report = prune(experts, router, 2)
    kept = sorted(set(range(4)) - set(removed))
    assert report.refitted == kept
    assert result.error_compensated < 0.9 * result.error_uncompensated
    assert report.held_out_error_after < 0.9 * report.held_out_error_before
    whole = prune(*moe_layer(name), 2, SETTINGS, hidden[:200])[0]
    assert error(dense, output(*moe_layer(name), hidden[:200], kept)) == pytest.approx(
        whole.error_uncompensated, rel=1e-5
    )
    # The reported error is that of the weights in place.
    assert error(output(*moe_layer(name), hidden), output(experts, router, hidden, kept)) == pytest.approx(
        result.error_compensated, rel=1e-4
    )


def test_refit_of_one_expert_per_token_is_the_ridge_solution_of_the_best_damping_by_held_out_samples(monkeypatch):
    monkeypatch.setattr(whole_experts, "SWEEPS", 1)
    experts, router = moe_layer(num_experts_per_tok=1)
    dense_experts, dense_router = moe_layer(num_experts_per_tok=1)
    hidden = hidden_inputs()
    y = output(dense_experts, dense_router, hidden)
    _, report = prune(experts, router, 2)
    kept = sorted(set(range(4)) - set(report.removed))
    with torch.no_grad():
        _, weights, indices = router(hidden)
    for index in kept:
        routed = tokens_of_expert(Experts(dense_experts), index, hidden, indices, weights)
        z, target, out = routed.inputs.detach().double(), y[routed.token], held_out()[routed.token]
        W = dense_experts.down_proj[index].detach()
        solutions = []
        for percdamp in (0.01, 0.1, 1.0):
            # Ridge regression of the residual as ordinary least squares on augmented rows.
            ridge = (percdamp * z[~out].square().sum(0).mean()).sqrt()
            rows = torch.cat([z[~out], ridge * torch.eye(40, dtype=torch.float64)])
            residual = torch.cat([target[~out] - z[~out] @ W.T, torch.zeros(40, 24, dtype=torch.float64)])
            solutions.append(W + torch.linalg.lstsq(rows, residual).solution.T)
        held = [(target[out] - z[out] @ solution.T).square().sum().item() for solution in solutions]
        best = solutions[held.index(min(held))]
        assert torch.allclose(experts.down_proj[index], best, rtol=1e-3, atol=1e-4 * best.abs().max().item())


def test_refit_that_held_out_samples_reject_is_dropped():
    experts, router = moe_layer()
    before = experts.down_proj.data.clone()
    hidden = hidden_inputs()
    # The held-out samples go to other experts, and what the first ones learn from the rest is wrong for them.
    hidden[held_out()] *= -1
    router.weight.data.zero_()
    router.weight.data[:2, 0], router.weight.data[2:, 0] = 1.0, -1.0
    hidden[:, 0] = torch.where(held_out(), -9.0, 9.0)
    _, report = prune(experts, router, 2, hidden=hidden)
    unlearned = [index for index in range(4) if index not in report.refitted]
    assert unlearned and torch.equal(experts.down_proj.data[unlearned], before[unlearned])
    assert report.held_out_error_after <= report.held_out_error_before


def test_prune_whole_experts_without_compensation_or_held_out_samples_leaves_the_weights(caplog):
    for settings, hidden in (
        (PruningSettings(CPU, CPU, compensate=False), hidden_inputs()),
        (SETTINGS, hidden_inputs()[:SEQLEN]),
    ):
        experts, router = moe_layer()
        before = experts.down_proj.data.clone()
        result, report = prune(experts, router, 1, settings, hidden, parts=1)
        assert torch.equal(experts.down_proj.data, before) and not report.refitted
        assert result.error_compensated == result.error_uncompensated > 0
    assert caplog.messages == [
        "experts: nothing is held out of a single sample, and nothing refitted; raise --num_samples"
    ]


def test_prune_whole_experts_on_non_finite_activations_is_refused():
    experts, router = moe_layer()
    experts.down_proj.data[1, 0, 0] = torch.inf
    with pytest.raises(UserError, match="experts: non-finite activations"):
        prune(experts, router, 1)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("settings", [SETTINGS, PruningSettings(CPU, CPU, batch_samples=3, whole_experts=True)])
def test_prune_layers_without_an_expert_that_no_token_reaches_changes_no_logit(name, settings, samples):
    key = "num_local_experts" if name == "mixtral" else "num_experts"
    model = make_tiny(name, torch.float64, **{key: 5}, mlp_only_layers=[])
    with torch.no_grad():
        for layer in model.model.layers:
            # Two of these pairs of logits are above 0 for every token, and expert 2 is not.
            weight = layer.mlp.gate.weight
            weight[1], weight[4], weight[2] = -weight[0], -weight[3], 0
        dense = model(samples).logits
        plans = [LayerPlan(experts=1)] * 4
        masks, reports = prune_layers(model, find_family(model.config), samples, plans, settings)
        logits = model(samples).logits
    assert [report.experts.removed for report in reports] == [[2]] * 4
    assert [mask.kept_experts for mask in masks] == [[0, 1, 3, 4]] * 4
    assert all(report.experts.scores[2] == 0 for report in reports)
    assert all(report.mlp.error_uncompensated < 1e-12 for report in reports)
    assert (logits - dense).abs().max() <= 1e-6 * dense.abs().max()


@pytest.mark.parametrize(
    "name",
    ["gpt_oss", "llama4_text", "ernie4_5_moe", "hunyuan_v1_moe", "phimoe", "nemotron_h with latent experts"],
)
def test_prune_layers_reports_the_error_of_the_experts_outputs_in_every_layout(name, samples):
    """Biases, gates on inputs, routers with further tensors, in submodules or of two experts alone; latents."""
    outputs = []
    for count in (0, 2):
        model = make_tiny(name, torch.float64)
        family, layer = find_family(model.config), model.model.layers[3]
        plans = [LayerPlan()] * 3 + [LayerPlan(experts=count)]
        reports = prune_layers(model, family, samples, plans, SETTINGS)[1]
        seen = layer.get_submodule(family.experts).register_forward_hook(lambda *args: outputs.append(args[2]))
        with torch.no_grad():
            model(samples)
        seen.remove()
    dense, pruned = (output.view(-1, 128, output.shape[-1]).sum(0) for output in outputs)
    assert 0 < reports[0].mlp.error_compensated <= reports[0].mlp.error_uncompensated
    assert error(dense, pruned) == pytest.approx(reports[0].mlp.error_compensated, rel=1e-4)


def test_prune_layers_feeds_the_outputs_of_masked_layers_to_the_next(samples):
    model, dense = make_tiny("mixtral"), make_tiny("mixtral")
    plans, family, seen = [LayerPlan(experts=2)] * 4, find_family(dense.config), {}
    prune_layers(model, family, samples, plans, SETTINGS)
    # Pruned alone, the last layer gets the dense model's inputs and removes others, or by another score.
    alone = prune_layers(dense, family, samples, [LayerPlan()] * 3 + plans[:1], SETTINGS)[1][0]
    model.model.layers[3].register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    with torch.no_grad():
        model(samples)
    again = make_tiny("mixtral")
    again.model.layers[3].register_forward_pre_hook(lambda module, args: (seen["hidden"], *args[1:]))
    block, calls = again.model.layers[3].mlp, []
    block.experts.register_forward_pre_hook(lambda module, args: calls.append((args, 16)))
    with torch.no_grad():
        again(samples)
        _, report = prune_whole_experts(Experts(block.experts), Router(block.gate), "experts", calls, 2, SETTINGS)
    last = prune_layers(make_tiny("mixtral"), family, samples, plans, SETTINGS)[1][3]
    assert last.experts.scores == pytest.approx(report.scores, rel=1e-4)
    assert last.experts.scores != pytest.approx(alone.experts.scores, rel=1e-2)
