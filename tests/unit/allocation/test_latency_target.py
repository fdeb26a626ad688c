"""Targets in milliseconds, by made-up tables whose answers are known, and against brute force over all plans."""

import itertools

import numpy as np
import pytest

from slim_utils.allocation.budget import LayerCurves, LayerUnits, LossCurve, UnreachableTargetError, allocate_layers
from slim_utils.allocation.latency_target import latency_target_of
from slim_utils.allocation.planner import Planner
from slim_utils.allocation.schedules import non_uniform_ratios
from slim_utils.common.errors import UserError
from slim_utils.families import find_family
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.masks import LayerPlan
from slim_utils.pruning_config import PruningConfig
from tests.latency_tables import made_up_table
from tests.tiny_models import make_tiny


def stairs(kept: int) -> float:
    """A new tile of the kernel for every eight columns."""
    return 4 + 2 * -(-kept // 8)


def bent(kept: int) -> float:
    """Time that stays the same for few columns, where a step only reads the cache."""
    return max(8.0, 0.4 * kept)


HEADS = {"linear": lambda kept: 3.0 * kept, "flat": lambda kept: 5.0, "bent": lambda kept: max(4.0, 3.0 * kept)}
COLUMNS = {"linear": lambda kept: 2 + 0.5 * kept, "stairs": stairs, "bent": bent}


def planner(heads: str, columns: str, **flags) -> Planner:
    model = make_tiny("gqa")
    table = made_up_table(model.config, HEADS[heads], COLUMNS[columns])
    config = PruningConfig(device="cpu", cache_dev="cpu", latency_of="prefill", **flags)
    return Planner(config, ResidentModel(model, find_family(model.config)), table)


def milliseconds(plans: list[LayerPlan], heads: str, columns: str) -> float:
    """Time of the model without the units of ``plans``: two kv groups with three query heads, 40 columns."""
    return 1 + sum(HEADS[heads](3 - plan.heads // 2) + COLUMNS[columns](40 - plan.columns) for plan in plans)


@pytest.mark.parametrize("target", ["0.8x", "0.5x"])
@pytest.mark.parametrize("allocation", ["uniform", "log_increase"])
@pytest.mark.parametrize(("heads", "columns"), list(itertools.product(HEADS, COLUMNS)))
def test_plans_of_a_schedule_meet_the_target_by_the_table(heads, columns, allocation, target):
    made = planner(heads, columns, target_latency=target, allocation=allocation)
    dense = milliseconds([LayerPlan()] * 4, heads, columns)
    requested = float(target[:-1]) * dense
    # The highest ratio is that of the last layer; a logarithmic schedule starts with a dense layer.
    ratios = [1.0] * 4 if allocation == "uniform" else non_uniform_ratios(allocation, 0, 1, 4)
    most = [layer.plan(*layer.removed_by(ratio)) for layer, ratio in zip(made.units, ratios, strict=True)]
    if milliseconds(most, heads, columns) > requested:
        with pytest.raises(UnreachableTargetError, match="--target_latency"):
            made.plans()
        return
    plans = made.plans()
    predicted = milliseconds(plans, heads, columns)
    record = made.latency(plans)
    assert [1e3 * record[name] for name in ("dense", "requested", "predicted")] == pytest.approx(
        [dense, requested, predicted]
    )
    # To within one column, or where columns save nothing, to within a tile or a head of every layer.
    step = 0.5 if columns == "linear" or (columns, target) == ("bent", "0.8x") else 8
    assert requested - step - 1e-6 <= predicted <= requested + 1e-6


def test_plans_of_a_linear_table_are_those_of_the_same_budget_in_parameters():
    # Times in proportion to weights: 2 · 2 · 4 · 24 of the query heads of a unit, 3 · 24 of a column.
    model = make_tiny("gqa")
    table = made_up_table(model.config, lambda kept: kept * 2 * 2 * 4 * 24 / 1e3, lambda kept: kept * 72 / 1e3, rest=0)
    flags = {"device": "cpu", "cache_dev": "cpu", "allocation": "log_increase"}
    host = ResidentModel(model, find_family(model.config))
    # Keys and values have 2 · 8 · 24 weights in every layer, which are not in the table.
    weights = 4 * (3 * 384 + 40 * 72)
    latency = Planner(PruningConfig(target_latency="0.7x", latency_of="prefill", **flags), host, table)
    ratio = Planner(PruningConfig(target_ratio=0.3 * weights / (weights + 4 * 384), **flags), host)
    assert latency.plans() == ratio.plans()


def test_target_in_milliseconds_is_that_of_the_same_share():
    plans = planner("linear", "linear", target_latency="0.8x").plans()
    made = planner("linear", "linear", target_latency=f"{0.8 * milliseconds([LayerPlan()] * 4, 'linear', 'linear')}ms")
    assert made.plans() == plans


@pytest.mark.parametrize(
    ("target", "message"),
    [("400ms", "--target_latency 400ms: the model has 125 ms of prefill"), ("0.01x", "can be removed; .*--target_lat")],
)
def test_target_out_of_reach_is_refused(target, message):
    with pytest.raises(UserError, match=message):
        planner("linear", "linear", target_latency=target).plans()


def test_multiples_are_kept_and_the_target_is_met():
    plans = planner("linear", "bent", target_latency="0.75x", multiple_of=8).plans()
    assert all((40 - plan.columns) % 8 == 0 for plan in plans)
    dense = milliseconds([LayerPlan()] * 4, "linear", "bent")
    assert 0.75 * dense - 8 * 0.4 <= milliseconds(plans, "linear", "bent") <= 0.75 * dense


def brute_force(curves: list[LayerCurves], time_of, requested: float) -> float:
    """Least loss of all plans of two layers that take no longer than ``requested``."""
    options = [range(3), range(9)] * 2
    best = np.inf
    for h0, c0, h1, c1 in itertools.product(*options):
        if time_of([(h0, c0), (h1, c1)]) <= requested + 1e-9:
            losses = (curves[0].heads.losses[h0], curves[0].columns.losses[c0])
            losses += (curves[1].heads.losses[h1], curves[1].columns.losses[c1])
            best = min(best, sum(losses))
    return best


@pytest.mark.parametrize("target", ["0.9x", "0.8x", "0.65x", "0.5x"])
@pytest.mark.parametrize("seed", range(4))
def test_plans_of_least_loss_are_near_those_of_brute_force(seed, target):
    """A table that is not linear: heads save less and less, columns more and more."""
    generator = np.random.default_rng(seed)
    config = make_tiny("gqa", num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1).config
    head_time, column_time = (lambda kept: 4 * kept**0.7), (lambda kept: 0.02 * kept**2 + 0.5 * kept)
    table = made_up_table(config, head_time, column_time, units=3, width=9)
    units = [LayerUnits(3, 9, 0, 0)] * 2
    losses = [np.concatenate([[0], np.cumsum(np.sort(generator.random(n)))]) for n in (2, 8, 2, 8)]

    def curves(units: list[LayerUnits]) -> list[LayerCurves]:
        return [
            LayerCurves(
                LossCurve(losses[2 * i], unit.head_cost, False), LossCurve(losses[2 * i + 1], unit.column_cost, True)
            )
            for i, unit in enumerate(units)
        ]

    def allocate(units: list[LayerUnits], budget: float) -> list[LayerPlan]:
        return [unit.plan(*pair) for unit, pair in zip(units, allocate_layers(curves(units), budget), strict=True)]

    def time_of(counts: list[tuple[int, int]]) -> float:
        return 1 + sum(head_time(3 - heads) + column_time(9 - columns) for heads, columns in counts)

    goal = latency_target_of(PruningConfig(target_latency=target, latency_of="prefill"), table, units)
    counts = goal.counts(goal.plans_by(allocate))
    requested = float(target[:-1]) * time_of([(0, 0)] * 2)
    assert time_of(counts) <= requested + 1e-9
    loss = sum(losses[2 * i + j][count] for i, pair in enumerate(counts) for j, count in enumerate(pair))
    best = brute_force(curves(units), time_of, requested)
    # The allocation rounds to whole columns; a plan that is wrong about the cost of heads would be far off.
    tolerance = max(curve.max() for curve in losses) / 4
    assert best - 1e-9 <= loss <= best + tolerance
