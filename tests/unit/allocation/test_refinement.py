"""Refinement: units that move between layers by the loss of the pruned model."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from slim_utils.allocation import refinement
from slim_utils.allocation import sensitivity as sensitivity_analysis
from slim_utils.allocation.budget import LayerUnits, UnreachableTargetError, cost_removed, layer_units
from slim_utils.allocation.refinement import REFINEMENT_SAMPLES, measure_around, refined_plans
from slim_utils.allocation.sensitivity import MIN_LOSS, KLProbe, LayerSensitivity, UnitSensitivity
from slim_utils.common.errors import UserError
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerPlan
from slim_utils.obs import SelectionOptions
from tests.tiny_models import make_tiny
from tests.unit.allocation.slimming import main

CPU = torch.device("cpu")
SETTINGS = PruningSettings(CPU, CPU, selection=SelectionOptions(exact_heads=True, column_group=4))
# The tiny models have 6 heads and 40 columns per layer.
PLAN = [LayerPlan(2, 4), LayerPlan(2, 12), LayerPlan(), LayerPlan(2, 20)]


def pruned(name: str, samples: torch.Tensor, plan: list[LayerPlan]) -> torch.nn.Module:
    model = make_tiny(name, torch.float64)
    prune_layers(model, find_family(model.config), samples, plan, SETTINGS)
    return model


@pytest.mark.parametrize("name", ["mha", "gqa", "opt", "gemma4_text of inputs by layer"])
@pytest.mark.parametrize("kind", ["heads", "columns"])
def test_measure_around_losses_are_those_of_the_pruned_model(kind, name, samples, monkeypatch):
    """The losses are those with a few units fewer and a few more removed from one layer of the pruned model."""
    monkeypatch.setattr(sensitivity_analysis, "PROBE_STRIDE", 1)
    model, dense = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    family = find_family(model.config)
    sensitivities = measure_around(ResidentModel(model, family), samples, None, PLAN, SETTINGS)
    assert sorted(sensitivities) == [0, 1, 3]
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, before)
    planned, probe, losses = pruned(name, samples, PLAN), samples[:REFINEMENT_SAMPLES], []
    units = {"heads": units_of_heads(model), "columns": 40}[kind]
    per_unit = {"heads": SETTINGS.heads_per_unit(layer_shapes(model.config)[1]), "columns": 1}[kind]
    count, step = asdict(PLAN[1])[kind] // per_unit, max(1, round(units / 16))
    target = family.attention_out if kind == "heads" else family.mlp_out
    with torch.no_grad():
        expected = dense(probe).logits.log_softmax(-1)
        for other in (count - step, count + step):
            plan = [PLAN[0], replace(PLAN[1], **{kind: other * per_unit}), *PLAN[2:]]
            weight = family.decoder_layers(pruned(name, samples, plan))[1].get_submodule(target).weight
            family.decoder_layers(planned)[1].get_submodule(target).weight.copy_(weight)
            changed = planned(probe).logits.log_softmax(-1)
            total = functional.kl_div(changed, expected, reduction="sum", log_target=True).item()
            losses.append(total / expected[..., 0].numel())
    sensitivity = getattr(sensitivities[1], kind)
    curve = sensitivity.loss_curve(sensitivity.loss)
    assert curve[count + step] - curve[count - step] == pytest.approx(losses[1] - losses[0], rel=1e-3, abs=3e-8)


def units_of_heads(model: torch.nn.Module) -> int:
    return SETTINGS.head_units(layer_shapes(model.config)[1])


def test_measure_around_interrupted_restores_the_dense_model(samples, monkeypatch):
    model, dense = make_tiny("mha"), make_tiny("mha")
    monkeypatch.setattr(KLProbe, "advance", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure_around(ResidentModel(model, find_family(model.config)), samples, None, PLAN, SETTINGS)
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", ["olmo2", "phi3", "gemma2", "qwen2_moe", "gpt_oss", "gemma4_text of inputs by layer"])
def test_refined_plans_of_every_family_keep_the_budget(name, samples):
    model, dense = make_tiny(name), make_tiny(name)
    host, family = ResidentModel(model, find_family(model.config)), find_family(model.config)
    units = layer_units(host.layers, family, layer_shapes(model.config), SETTINGS)
    plan = [layer.plan(1, 8) for layer in units]
    measured = measure_around(host, samples, None, plan, SETTINGS)
    plans = refined_plans(measured, units, plan, sum(layer.head_cost + 8 * layer.column_cost for layer in units))
    assert sum(layer.column_cost * 8 + layer.head_cost for layer in units) == pytest.approx(
        sum(
            layer.head_cost * layer.counts(plan)[0] + layer.column_cost * plan.columns
            for layer, plan in zip(units, plans, strict=True)
        ),
        abs=max(layer.column_cost for layer in units),
    )
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, before)


def test_probe_hook_heads_under_joint_norms_have_no_smaller_candidate(samples):
    """The rows that feed removed heads are zeroed, so these heads cannot be restored."""
    model = make_tiny("olmo2")
    outcomes, family = [], find_family(model.config)
    hook = refinement._ProbeHook(family, SETTINGS)
    prune_layers(model, family, samples, PLAN, SETTINGS, hook=hook)
    for (_, name), probed in hook.maps.items():
        outcomes.append((name == family.attention_out, min(probed.candidate_weights) > probed.count))
    assert set(outcomes) == {(True, True), (False, False)}


def test_measure_around_dead_layer_has_no_loss(samples):
    model = make_tiny("mha")
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    host, family = ResidentModel(model, find_family(model.config)), find_family(model.config)
    units = layer_units(host.layers, family, layer_shapes(model.config), SETTINGS)
    plan = [layer.plan(2, 8) for layer in units]
    measured = measure_around(host, samples, None, plan, SETTINGS)
    assert measured[0].heads.loss is None
    budget = sum(2 * layer.head_cost + 8 * layer.column_cost for layer in units)
    plans = refined_plans(measured, units, plan, budget)
    assert plans[0].heads == 3


def curve(slope: float, units: int) -> UnitSensitivity:
    return UnitSensitivity((np.arange(units + 1.0) ** 1.5).tolist(), units // 2, slope * (units // 2) ** 1.5)


def layer_sensitivity(slope: float) -> LayerSensitivity:
    return LayerSensitivity(heads=curve(slope, 8), columns=curve(slope / 100, 57))


def test_refined_plans_move_few_units_and_keep_the_budget():
    units = [LayerUnits(9, 64, 100, 3)] * 2
    measured = {0: layer_sensitivity(4), 1: layer_sensitivity(1)}
    plan = [LayerPlan(4, 32)] * 2
    budget = 2 * (4 * 100 + 32 * 3)
    counts = [[plan.heads, plan.columns] for plan in refined_plans(measured, units, plan, budget)]
    assert budget <= sum(100 * heads + 3 * columns for heads, columns in counts) < budget + 3
    # The first layer is more sensitive; one of 9 heads and 8 of 64 columns may move.
    assert counts == [[3, 24], [5, 40]]


def test_refined_plans_unmeasured_layers_stay_dense():
    units = [LayerUnits(9, 64, 100, 3)] * 2
    plans = [LayerPlan(), LayerPlan(0, 32)]
    assert refined_plans({1: layer_sensitivity(1)}, units, plans, 96) == plans


def test_refined_plans_of_a_plan_rounded_to_multiples_meet_the_budget():
    """A plan of 12 of 16 columns keeps 8 columns, 4 more than the budget leaves and more than an eighth of 16 gives."""
    units = [LayerUnits(9, 16, 10, 30, num_experts=4)] * 2
    columns = UnitSensitivity((np.arange(16.0) ** 1.5).tolist(), 8, 1.0)
    measured = {index: LayerSensitivity(heads=curve(1, 8), columns=columns) for index in range(2)}
    plan, budget = [LayerPlan(4, 8)] * 2, 2 * (4 * 10 + 12 * 30)
    with pytest.raises(UnreachableTargetError):
        refined_plans(measured, units, plan, budget)
    plans = refined_plans(measured, units, plan, budget, [(1, 8)] * 2)
    counts = [layer.counts(plan) for layer, plan in zip(units, plans, strict=True)]
    assert budget <= cost_removed(counts, units) < budget + 30


@pytest.fixture
def words(words) -> list:
    return [*words, "--target_ratio", 0.3]


def kept(folder) -> list[list[int]]:
    layers = json.loads((folder / "pruning.json").read_text())["layers"]
    return [[len(layer[kind]["kept"]) for kind in ("heads", "columns")] for layer in layers]


def test_refine_after_a_schedule_changes_the_plan(words, tmp_path):
    for name, flags in (("plain", []), ("refined", ["--refine", 2])):
        main(*words, *flags, "--sink_windows", 20, "--save_pruned_weights", "--save_dir", tmp_path / name)
    before, after = kept(tmp_path / "plain"), kept(tmp_path / "refined")
    assert before != after
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "refined")]
    shares = [record["sizes"]["block_share_removed"] for record in records]
    assert shares[1] == pytest.approx(shares[0], abs=72 / 17664)
    card = (tmp_path / "refined" / "pruned_weights" / "README.md").read_text(encoding="utf-8")
    assert "| pruning ratio | 0.3 of the block weights (uniform, refined 2 ×) |" in card
    assert "search" not in records[1] and len(records[1]["refinement"]) == 4
    assert any(layer["mlp"]["loss"] > MIN_LOSS for layer in records[1]["refinement"])


def test_refine_resumed_measures_no_layer_twice(words, tmp_path, monkeypatch):
    flags = [*words, "--refine", 1]
    main(*flags, "--save_dir", tmp_path / "whole")
    divergence, measured = KLProbe.divergence, []

    def counted(self: KLProbe, index: int) -> float:
        measured.append(index)
        if len(measured) == 9:
            # Interrupt the second layer.
            raise KeyboardInterrupt
        return divergence(self, index)

    monkeypatch.setattr(refinement.KLProbe, "divergence", counted)
    with pytest.raises(KeyboardInterrupt):
        main(*flags, "--save_dir", tmp_path / "out")
    assert LayerStore(tmp_path / "out").exists()
    first = measured.copy()
    main(*flags, "--resume", "--save_dir", tmp_path / "out")
    # The current plan, then two candidates for each map; a finished layer is not measured again.
    assert first == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert measured[9:] == [0] + [index for index in (1, 2, 3) for _ in range(4)]
    assert (tmp_path / "out" / "pruning.json").read_text() == (tmp_path / "whole" / "pruning.json").read_text()


def test_refine_without_time_measures_first_and_last_layer(words, tmp_path, monkeypatch):
    divergence, measured = KLProbe.divergence, []
    monkeypatch.setattr(KLProbe, "divergence", lambda self, index: measured.append(index) or divergence(self, index))
    main(*words, "--refine", 1, "--search_minutes", 0, "--save_dir", tmp_path / "out")
    assert measured == [0] + [0] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--refine", -1], "--refine -1: at least 0"),
        (["--refine", 1, "--stream", "--save_dir", "out"], "--refine needs the whole model in memory"),
        (["--refine", 1, "--allocation", "log_increase", "--target_ratio", 0.9], "can be removed"),
        (["--refine", 1, "--preset", "best", "--stream", "--save_dir", "out"], "--refine needs the whole model"),
        (["--refine", 1, "--no_compensate"], "--refine needs compensation; leave --no_compensate out"),
        (["--refine", 1, "--uniform_shapes", "--save_pruned_weights", "--save_dir", "out"], "leave --refine out"),
    ],
)
def test_refine_with_contradictory_flags_is_refused(flags, message, words):
    with pytest.raises(UserError, match=message):
        main(*words, *flags)


def test_refine_without_target_is_refused(checkpoint, text_file):
    flags = ["--seqlen", 32, "--sparsity", 0.3, "--refine", 1]
    with pytest.raises(UserError, match="--refine moves units of a target: add --target_ratio or another target"):
        main(checkpoint, "--data_file", text_file, *flags)
