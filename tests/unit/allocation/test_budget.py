"""Allocation of a budget of block weights: schedules, loss curves, profiles and the sensitivity analysis."""

import itertools
import json
import signal

import numpy as np
import pytest
import torch

import model_slimming
from slim_utils.allocation.budget import (
    LayerCurves,
    LayerUnits,
    LossCurve,
    allocate,
    allocate_with_depth_decay,
    block_weights,
    cost_removed,
    layer_units,
    scaled_counts,
)
from slim_utils.allocation.planner import Planner
from slim_utils.allocation.schedules import layer_ratios, non_uniform_ratios
from slim_utils.cli.slimming_checks import num_sink_windows, with_preset
from slim_utils.common.errors import UserError
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.resume import LayerStore
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.profiling.model_stats import removed_share
from slim_utils.pruning_config import PruningConfig
from slim_utils.slimgpt import SlimGPT
from tests.tiny_models import make_tiny
from tests.unit.allocation.slimming import main

CPU = torch.device("cpu")
MODEL_KINDS = ["mha", "gqa", "phi3", "olmo2", "opt", "mixtral", "qwen3_moe"]


@pytest.fixture
def deadline():
    """Fail the test after ten seconds of CPU time."""

    def expired(signum, frame):
        pytest.fail("does not terminate", pytrace=False)

    previous = signal.signal(signal.SIGVTALRM, expired)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, previous)


def convex(generator: np.random.Generator, units: int) -> np.ndarray:
    return np.concatenate([[0], np.sort(generator.random(units)).cumsum()])


@pytest.mark.parametrize("seed", range(10))
def test_allocate_columns_alone_is_optimal(seed):
    generator = np.random.default_rng(seed)
    curves = [LossCurve(convex(generator, 4), 3, True) for _ in range(4)]
    for units in range(17):
        counts = allocate(curves, 3 * units)
        assert sum(counts) == units
        best = min(
            sum(curve.losses[n] for curve, n in zip(curves, choice, strict=True))
            for choice in itertools.product(range(5), repeat=4)
            if sum(choice) == units
        )
        assert sum(curve.losses[n] for curve, n in zip(curves, counts, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_allocate_heads_and_columns_is_near_the_optimum(seed):
    generator = np.random.default_rng(seed)
    curves = [LossCurve(convex(generator, 3) * 4, 7, False) for _ in range(2)]
    curves += [LossCurve(convex(generator, 12), 2, True) for _ in range(2)]
    for budget in (5, 11, 24, 40):
        counts = allocate(curves, budget)
        removed = sum(curve.cost * n for curve, n in zip(curves, counts, strict=True))
        assert budget <= removed < budget + 2
        best = min(
            sum(curve.losses[n] for curve, n in zip(curves, choice, strict=True))
            for choice in itertools.product(range(4), range(4), range(13), range(13))
            if budget <= sum(curve.cost * n for curve, n in zip(curves, choice, strict=True)) < budget + 2
        )
        assert sum(curve.losses[n] for curve, n in zip(curves, counts, strict=True)) <= 1.02 * best


def reachable(units: list[LayerUnits]) -> set[int]:
    """Totals of block weights that some choice of units removes."""
    counts = [itertools.product(range(layer.heads), range(layer.columns)) for layer in units]
    return {cost_removed(choice, units) for choice in itertools.product(*counts)}


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("units", [[LayerUnits(8, 4, 100, 3)], [LayerUnits(4, 3, 100, 7)] * 3])
def test_scaled_counts_with_too_few_columns_is_near_the_budget(units):
    """A step of heads has more weights than all columns, so few budgets can be met to one column."""
    choices = sorted(reachable(units))
    for budget in range(1, choices[-1] + 1, 7):
        removed = cost_removed(scaled_counts(lambda highest: [highest] * len(units), units, budget), units)
        nearest = min(abs(total - budget) for total in choices)
        assert abs(removed - budget) <= nearest + 14, budget
        met = any(budget <= total < budget + 3 for total in choices)
        assert len(units) > 1 or abs(removed - budget) <= (3 if met else nearest), budget


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("budget", range(1, 709, 37))
def test_allocate_with_too_few_columns_is_near_the_budget(budget):
    curves = [LossCurve(np.arange(8.0) ** 2, 100, False), LossCurve(np.arange(4.0) ** 2, 3, True)]
    heads, columns = allocate(curves, budget)
    reached = {100 * i + 3 * j for i in range(8) for j in range(4)}
    met = any(budget <= total < budget + 3 for total in reached)
    removed = 100 * heads + 3 * columns
    assert 0 <= removed - budget < 3 if met else abs(removed - budget) == min(abs(r - budget) for r in reached)


def test_allocate_with_depth_decay_large_losses_move_units_to_late_layers():
    """Equal layers get equal counts while the losses are negligible."""
    curve = np.arange(101) ** 2
    for scale, even in ((1e-9, True), (1e-4, False)):
        layers = [LayerCurves(LossCurve(np.zeros(1), 1, False), LossCurve(scale * curve, 1, True))] * 4
        columns = [count for _, count in allocate_with_depth_decay(layers, 200)]
        assert sum(columns) == 200
        assert (columns == [50] * 4) == even
        assert columns == sorted(columns)


def test_allocate_unreachable_budget_is_refused():
    with pytest.raises(UserError, match="only 92% of what the target removes can be removed; lower --target_ratio"):
        allocate([LossCurve(np.arange(5.0), 3, True)], 13)


@pytest.mark.parametrize("name", MODEL_KINDS)
@pytest.mark.parametrize("unit", ["query_head", "kv_group"])
@pytest.mark.parametrize("strategy", ["uniform", "log_increase", "linear_decrease"])
def test_scaled_counts_of_schedules_meet_the_budget_to_one_column(name, unit, strategy):
    model = make_tiny(name)
    family, shapes = find_family(model.config), layer_shapes(model.config)
    layers, settings = family.decoder_layers(model), PruningSettings(CPU, CPU, gqa_unit=unit)
    units, total = layer_units(layers, family, shapes, settings), block_weights(layers, family, shapes)

    def schedule(highest: float) -> list[float]:
        ratios = [highest] * 3 if strategy == "uniform" else non_uniform_ratios(strategy, 0.0, highest, 3)
        return layer_ratios(range(1, 4), 4, ratios)

    for share in (0.05, 0.15, 0.25):
        counts = scaled_counts(schedule, units, share * total)
        plans = [layer.plan(*pair) for layer, pair in zip(units, counts, strict=True)]
        masks = [settings.size_mask(shape, plan) for shape, plan in zip(shapes, plans, strict=True)]
        assert [mask.plan for mask in masks] == plans
        removed = removed_share(layers, family, masks) * total
        assert share * total - 1e-6 <= removed < share * total + max(layer.column_cost for layer in units)
        assert masks[0].kept_heads == list(range(6))
    with pytest.raises(UserError, match="can be removed"):
        scaled_counts(schedule, units, 0.99 * total)


# A column of the tiny model has 3 · 24 weights; its four layers have 4 · (24 · 24 · 2 + 24 · 8 · 2 + 3 · 24 · 40).
COLUMN, TOTAL = 72, 17664


@pytest.mark.parametrize("allocation", ["uniform", "log_increase", "search"])
def test_target_ratio_is_met_and_reused_as_profile(allocation, words, tmp_path):
    lowest = ["--min_sparsity", 0.0625] if allocation == "log_increase" else []
    main(*words, "--target_ratio", 0.3, "--allocation", allocation, *lowest, "--save_dir", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    removed = record["sizes"]["block_share_removed"] * TOTAL
    assert 0.3 * TOTAL - 1e-6 <= removed < 0.3 * TOTAL + COLUMN
    # A profile keeps the sizes of every layer, with other heads and columns.
    main(*words, "--seed", 3, "--profile", tmp_path / "out" / "pruning.json", "--save_dir", tmp_path / "again")
    kept = []
    for name in ("out", "again"):
        layers = json.loads((tmp_path / name / "pruning.json").read_text())["layers"]
        kept.append([[len(layer[kind]["kept"]) for kind in ("heads", "columns")] for layer in layers])
    assert kept[0] == kept[1]


def test_preset_best_equals_its_flags(words, tmp_path):
    target = ["--target_ratio", 0.3]
    main(*words, *target, "--preset", "best", "--save_dir", tmp_path / "preset")
    flags = ["--exact_heads", "--column_group", 32, "--sink_windows", 512, "--allocation", "search"]
    main(*words, *target, *flags, "--save_dir", tmp_path / "flags")
    assert (tmp_path / "preset" / "pruning.json").read_text() == (tmp_path / "flags" / "pruning.json").read_text()


@pytest.mark.parametrize(
    ("flags", "allocation", "column_group", "sink_windows"),
    [
        ([], None, None, 0),
        (["--preset", "best"], None, 32, 512),
        (["--preset", "best", "--target_ratio", 0.3, "--allocation", "uniform"], "uniform", 32, 512),
        (["--preset", "best", "--target_ratio", 0.3, "--stream", "--save_dir", "out"], "log_increase", 32, 512),
        (["--preset", "best", "--target_params", 9e4, "--column_group", 4], "search", 4, 512),
        (["--preset", "best", "--sink_windows", 0], None, 32, 0),
    ],
)
def test_with_preset_best_keeps_explicit_flags(flags, allocation, column_group, sink_windows, words):
    args = model_slimming.build_parser().parse_args(list(map(str, [*words, *flags])))
    config = with_preset(PruningConfig(**vars(args)))
    windows = num_sink_windows(config, bos=False)
    assert (config.allocation, config.column_group, windows) == (allocation, column_group, sink_windows)
    assert config.exact_heads == ("best" in flags)


def test_target_ratio_with_uniform_shapes_is_met(words, tmp_path):
    flags = ["--target_ratio", 0.3, "--uniform_shapes", "--save_pruned_weights", "--save_dir", tmp_path / "out"]
    main(*words, *flags)
    share = json.loads((tmp_path / "out" / "run.json").read_text())["sizes"]["block_share_removed"]
    assert 0.3 <= share < 0.3 + 4 * COLUMN / TOTAL
    assert "| pruning ratio | 0.3 of the block weights (uniform) |" in (
        tmp_path / "out" / "pruned_weights" / "README.md"
    ).read_text(encoding="utf-8")


def test_search_of_a_range_measures_its_layers_alone(words, tmp_path):
    flags = ["--target_ratio", 0.2, "--allocation", "search", "--minlayer", 1, "--maxlayer", 3]
    main(*words, *flags, "--save_dir", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [layer["layer"] for layer in record["search"]] == [1, 2]
    assert record["sizes"]["block_share_removed"] * TOTAL == pytest.approx(0.2 * TOTAL, abs=COLUMN)
    assert {layer["layer"] for layer in record["layers"]} == {1, 2}


def test_search_unreachable_target_is_refused_before_measuring(words, tmp_path, monkeypatch):
    monkeypatch.setattr(Planner, "measured_plans", lambda *args: pytest.fail("measured"))
    with pytest.raises(UserError, match="can be removed; lower --target_ratio"):
        main(*words, "--target_ratio", 0.99, "--preset", "best", "--save_dir", tmp_path / "out")


def test_search_single_kv_group_is_kept(tokenizer, text_file, tmp_path):
    """A layer with a single kv group loses columns alone."""
    config = make_tiny("gqa").config
    config.num_key_value_heads = 1
    type(make_tiny("gqa"))(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--data_file", text_file, "--num_samples", 8, "--seqlen", 32, "--device", "cpu", "--skip_evaluate"]
    flags += ["--target_ratio", 0.2, "--preset", "best", "--gqa_unit", "kv_group", "--save_dir", tmp_path / "out"]
    main(tmp_path / "model", *flags)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sizes"]["block_share_removed"] >= 0.2
    assert all(layer["attention"]["loss"] is None for layer in record["search"])


def test_preset_best_of_moe_model_searches_and_refines(tokenizer, text_file, tmp_path):
    make_tiny("qwen2_moe").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--data_file", text_file, "--target_ratio", 0.3, "--seqlen", 32, "--num_samples", 8, "--device", "cpu"]
    flags += ["--preset", "best", "--refine", 1, "--skip_evaluate", "--save_dir", tmp_path / "out"]
    main(tmp_path / "model", *flags)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["arguments"]["allocation"] == "search"
    assert all(layer["mlp"]["loss"] > 0 for layer in record["search"])
    # To 8 columns of every expert.
    assert record["sizes"]["block_share_removed"] == pytest.approx(0.3, abs=0.1)


def test_search_without_time_measures_first_and_last_layer(words, tmp_path):
    flags = [*words, "--target_ratio", 0.3, "--allocation", "search"]
    main(*flags, "--search_minutes", 0, "--save_dir", tmp_path / "short")
    main(*flags, "--search_minutes", 60, "--save_dir", tmp_path / "long")
    losses = {
        name: [layer["mlp"]["loss"] for layer in json.loads((tmp_path / name / "run.json").read_text())["search"]]
        for name in ("short", "long")
    }
    assert [loss is None for loss in losses["short"]] == [False, True, True, False]
    assert all(losses["long"]) and losses["long"][::3] == losses["short"][::3]


def test_target_params_is_met(words, checkpoint, tmp_path):
    dense = make_tiny("gqa").num_parameters()
    target = dense - 4000
    main(*words, "--target_params", target, "--save_pruned_weights", "--save_dir", tmp_path / "out")
    sizes = json.loads((tmp_path / "out" / "run.json").read_text())["sizes"]
    assert sizes["parameters_dense"] == dense
    assert target - COLUMN < sizes["parameters_pruned"] <= target


def test_search_resumed_measures_no_layer_twice(words, tmp_path, monkeypatch):
    flags = [*words, "--target_ratio", 0.3, "--allocation", "search"]
    main(*flags, "--save_dir", tmp_path / "whole")
    measured = []
    prune = SlimGPT.error_curve

    def counted(self, *args):
        measured.append(self.name)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return prune(self, *args)

    monkeypatch.setattr(SlimGPT, "error_curve", counted)
    with pytest.raises(KeyboardInterrupt):
        main(*flags, "--save_dir", tmp_path / "out")
    assert LayerStore(tmp_path / "out").exists()
    main(*flags, "--resume", "--save_dir", tmp_path / "out")
    assert len(measured) == 9
    assert (tmp_path / "out" / "pruning.json").read_text() == (tmp_path / "whole" / "pruning.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_ratio", 0.2, "--sparsity", 0.2], "--target_ratio sets the ratios; leave --sparsity out"),
        (["--target_ratio", 0.2, "--target_params", 9], "--target_ratio and --target_params exclude each other"),
        (["--allocation", "search", "--sparsity", 0.2], "--allocation needs a target: add --target_ratio"),
        (["--target_ratio", 1.5], r"--target_ratio 1\.5: must be between 0 and 1"),
        (["--target_ratio", 0.99], "of what the target removes can be removed; lower --target_ratio"),
        (["--target_params", 1e9], r"--target_params 1e\+09: the model has"),
        (["--target_ratio", 0.2, "--allocation", "search", "--no_compensate"], "search needs compensation"),
        (["--target_ratio", 0.2, "--search_minutes", 1], "--search_minutes limits a sensitivity analysis"),
        (["--target_ratio", 0.2, "--allocation", "search", "--search_minutes", -1], "--search_minutes -1.0: at least"),
        (["--target_ratio", 0.2, "--max_sparsity", 0.3], "leave --max_sparsity out"),
        (["--target_ratio", 0.2, "--min_sparsity", 0.1], "--min_sparsity is the first ratio of a strategy"),
        (["--profile", "p.json", "--minlayer", 1], "leave --minlayer and --maxlayer out"),
        (["--profile", "missing.json"], "--profile missing.json: no such file"),
    ],
)
def test_contradictory_budget_flags_are_refused(flags, message, words):
    with pytest.raises(UserError, match=message):
        main(*words, *flags)
