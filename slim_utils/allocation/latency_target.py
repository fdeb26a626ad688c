"""Target in measured milliseconds: the costs of units come from a latency table, which is not linear in them.

1. Linearise the table: the cost of a unit of heads, or of a column, of a layer is the mean saving per unit from the
   dense layer to the plan (at first, to half of the units).
2. Allocate with these costs; correct the budget by bisection until the table's prediction for the plan meets the
   target.
3. Linearise around that plan and repeat until the plan stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slim_utils.allocation.budget import LayerUnits, UnreachableTargetError, unreachable_target
from slim_utils.allocation.targets import Allocate, Target, parse_size
from slim_utils.common.errors import UserError
from slim_utils.masks import LayerPlan
from slim_utils.profiling.latency_table import LatencyTable, LayerLatency
from slim_utils.pruning_config import PruningConfig

# Costs and budgets are whole picoseconds: a column of a large model takes less than a nanosecond of a decoding step.
PICOSECONDS = 1e12
# A plan is near enough when it saves at most this share of the dense latency more than requested; the correction of the
# budget ends when its interval is shorter.
TOLERANCE, RESOLUTION = 1e-3, 1e-5
MAX_LINEARISATIONS, MAX_CORRECTIONS = 4, 40
# A unit counts at least this share of its part of the layer's time, where the table has the same time for fewer units.
MIN_SAVING = 1e-3


def latency_target_of(config: PruningConfig, table: LatencyTable, units: list[LayerUnits]) -> LatencyTarget:
    """Return the target of ``--target_latency``.

    Args:
        config: flags of the run.
        table: latency table of the model.
        units: units of every layer; their costs are not used.

    Raises:
        UserError: if the target is not below the latency of the model.
    """
    text, workload = str(config.target_latency), config.latency_workload
    table_seconds = _TableSeconds(table, workload)
    dense = PICOSECONDS * table_seconds.of_counts([(0, 0)] * len(units), units)
    size = parse_size("--target_latency", text)
    requested = size.of(dense) if size.is_share else PICOSECONDS * size.value
    if requested >= dense:
        raise UserError(f"--target_latency {text}: the model has {milliseconds(dense)} of {workload}")

    def describe(predicted: float) -> str:
        return (
            f"{workload} of {table.request.text}: requested {milliseconds(requested)}, "
            f"predicted {milliseconds(predicted)} on {table.device}"
        )

    return LatencyTarget(dense - requested, units, dense, describe, table=table_seconds)


def milliseconds(picoseconds: float) -> str:
    """Return a time of the table as text."""
    return f"{1e3 * picoseconds / PICOSECONDS:.4g} ms"


class _TableSeconds:
    """Seconds of one workload by the table.

    Args:
        table: latency table of the model.
        workload: one of ``WORKLOADS``.
    """

    def __init__(self, table: LatencyTable, workload: str) -> None:
        self._workload, self._steps = workload, table.request.new_tokens
        self._layers = table.layer_curves()
        self._rest = table.rest_seconds(workload)

    def of_counts(self, counts: Sequence[Sequence[int]], units: list[LayerUnits]) -> float:
        """Return the seconds of the model without ``counts`` of heads and columns of every layer."""
        layers = zip(self._layers, units, counts, strict=True)
        return self._rest + sum(sum(self.of_layer(layer, unit, *pair)) for layer, unit, pair in layers)

    def of_layer(self, layer: LayerLatency, unit: LayerUnits, heads: int, columns: int) -> tuple[float, float]:
        """Return the seconds of the attention and of the rest of a layer without so many heads and columns."""
        return (
            layer.heads.at(unit.heads - heads, self._workload, self._steps),
            layer.columns.at(unit.columns - columns, self._workload, self._steps),
        )

    def linearised(self, counts: Sequence[Sequence[int]], units: list[LayerUnits]) -> list[LayerUnits]:
        """Return ``units`` with the mean saving per unit up to ``counts`` as costs, in picoseconds.

        Where ``counts`` has none of the units of a layer, the mean saving up to half of them.
        """
        costs = []
        for layer, unit, (heads, columns) in zip(self._layers, units, counts, strict=True):
            removed = heads or unit.heads // 2, columns or unit.columns // 2
            dense, pruned = self.of_layer(layer, unit, 0, 0), self.of_layer(layer, unit, *removed)
            head_cost, column_cost = (
                round(PICOSECONDS * max((before - after) / count, MIN_SAVING * before / total)) if count else 0
                for before, after, count, total in zip(dense, pruned, removed, (unit.heads, unit.columns), strict=True)
            )
            costs.append(replace(unit, head_cost=head_cost, column_cost=max(column_cost, 1)))
        return costs


@dataclass(frozen=True)
class LatencyTarget(Target):
    """Target in picoseconds; ``budget``, ``dense`` and the costs are in this unit.

    Attributes:
        table: seconds of the model without some units.
    """

    table: _TableSeconds = field(kw_only=True)

    def removed(self, counts: Sequence[Sequence[int]]) -> float:
        """Return the picoseconds that the removal of ``counts`` saves by the table."""
        assert self.dense is not None
        return self.dense - PICOSECONDS * self.table.of_counts(counts, self.units)

    def record(self, plans: Sequence[LayerPlan]) -> dict[str, Any]:
        """Return the seconds of the dense model, requested, and predicted for ``plans``."""
        assert self.dense is not None
        predicted = self.dense - self.removed(self.counts(plans))
        sizes = {"dense": self.dense, "requested": self.dense - self.budget, "predicted": predicted}
        return {name: size / PICOSECONDS for name, size in sizes.items()}

    def plans_by(self, allocate: Allocate, around: Sequence[LayerPlan] = ()) -> list[LayerPlan]:
        """Return plans by ``allocate`` whose predicted latency meets the target, as near as its steps allow.

        Args:
            allocate: see :meth:`Target.plans_by`.
            around: plans that the table is linearised around at first; by default half of the units.

        Raises:
            UnreachableTargetError: if no budget of ``allocate`` gives plans that meet it.
        """
        counts = self.counts(around) if around else [(0, 0)] * len(self.units)
        plans: list[LayerPlan] = []
        for _ in range(MAX_LINEARISATIONS):
            units = self.table.linearised(counts, self.units)
            try:
                plans = self._corrected(lambda budget, units=units: allocate(units, budget))  # type: ignore[misc]
            except UnreachableTargetError:
                if not plans:
                    raise
                break
            if self.counts(plans) == counts:
                break
            counts = self.counts(plans)
        return plans

    def _corrected(self, allocate: Callable[[float], list[LayerPlan]]) -> list[LayerPlan]:
        """Return the plans of the least budget, to within the resolution, that meet the target by the table."""
        assert self.dense is not None
        low, high, budget, most = 0.0, None, self.budget, 0.0
        met: list[LayerPlan] | None = None
        for _ in range(MAX_CORRECTIONS):
            try:
                plans = allocate(budget)
            except UnreachableTargetError:
                high = budget
            else:
                saved = self.removed(self.counts(plans))
                most = max(most, saved)
                if saved < self.budget:
                    low = budget
                else:
                    met, high = plans, budget
                    if saved - self.budget <= TOLERANCE * self.dense:
                        break
            if high is None:
                budget += max(2 * (self.budget - saved), RESOLUTION * self.dense)
            elif high - low < RESOLUTION * self.dense:
                break
            else:
                budget = (low + high) / 2
        if met is None:
            raise unreachable_target(most, self.budget)
        return met
