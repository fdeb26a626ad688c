"""Allocation of a budget to the layers: by a schedule, by loss curves, or by another run's profile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from slim_utils.allocation.schedules import units_to_remove
from slim_utils.common.errors import UserError
from slim_utils.families import Family, LayerShape
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan, read_pruning
from slim_utils.profiling.model_stats import weights_of

# Bisection steps on a Lagrange multiplier or a ratio; each halves the interval.
BISECTION_STEPS = 60
# Chosen on calibration text alone, on SmolLM2-135M at 20, 33 and 50 %, where the losses sum to 0.1 to 0.5 nats; above
# twice that sum the decay no longer grows.
DEPTH_DECAY, MAX_TOTAL_LOSS = 1.5, 1.0


@dataclass(frozen=True)
class LayerUnits:
    """Removable units of one layer: heads and FFN columns, or experts.

    Attributes:
        heads: units of heads, one of which stays: query heads of each kv group, or kv groups.
        columns: columns of the FFN, or of each expert, or whole experts; one of them stays.
        head_cost: what one unit of heads counts in the budget: its block weights, multiply-accumulates, bytes or time.
        column_cost: the same for one column.
        heads_per_unit: query heads of one unit.
        head_groups: groups that one unit takes heads from.
        num_experts: experts of the layer; 0 for a dense FFN.
        whole_experts: whether ``columns`` are the experts of the layer.
        shared_weights: block weights of the shared expert that go with one column of every expert.
    """

    heads: int
    columns: int
    head_cost: int
    column_cost: int
    heads_per_unit: int = 1
    head_groups: int = 1
    num_experts: int = 0
    whole_experts: bool = False
    shared_weights: int = 0

    def plan(self, heads: int, columns: int) -> LayerPlan:
        """Return the plan that removes ``heads`` units of heads and ``columns`` columns, or experts."""
        if self.whole_experts:
            return LayerPlan(heads * self.heads_per_unit, experts=columns)
        return LayerPlan(heads * self.heads_per_unit, columns)

    def counts(self, plan: LayerPlan) -> tuple[int, int]:
        """Return the units of heads and the columns, or experts, that ``plan`` removes."""
        return plan.heads // self.heads_per_unit, plan.experts if self.whole_experts else plan.columns

    def removed_by(self, ratio: float) -> tuple[int, int]:
        """Return the units of heads and the columns that a pruning ratio removes."""
        return units_to_remove(self.heads, ratio), units_to_remove(self.columns, ratio)


def layer_units(
    layers: nn.ModuleList, family: Family, shapes: list[LayerShape], settings: PruningSettings
) -> list[LayerUnits]:
    """Return the units of every layer, with block weights as costs; parameters may be on the meta device."""
    units = []
    for layer, shape in zip(layers, shapes, strict=True):
        if settings.whole_experts:
            one_expert = settings.size_mask(shape, LayerPlan(experts=min(shape.num_experts, 1)))
            cost = weights_of(layer, family, one_expert)[0]
            # A single unit stays: heads and dense FFNs are not pruned.
            units.append(LayerUnits(1, shape.num_ffns, 0, cost, num_experts=shape.num_experts, whole_experts=True))
            continue
        # Of layers without heads, or without an FFN, a single unit stays.
        heads, per_unit = settings.head_units(shape) or 1, settings.heads_per_unit(shape)
        columns = shape.ffn_width or 1
        one_head, one_column = LayerPlan(per_unit if heads > 1 else 0, 0), LayerPlan(0, 1 if columns > 1 else 0)
        head_cost, column_cost = (
            weights_of(layer, family, settings.size_mask(shape, plan))[0] for plan in (one_head, one_column)
        )
        groups = shape.head_groups if settings.by_query_head(shape) else 1
        routed = settings.size_mask(replace(shape, num_shared_columns=0), one_column)
        shared_weights = column_cost - weights_of(layer, family, routed)[0]
        units.append(
            LayerUnits(
                heads,
                columns,
                head_cost,
                column_cost,
                heads_per_unit=per_unit,
                head_groups=groups,
                num_experts=shape.num_experts,
                shared_weights=shared_weights,
            )
        )
    return units


def plans_of_counts(counts: dict[int, tuple[int, int]], units: list[LayerUnits]) -> list[LayerPlan]:
    """Return the plan of every layer for ``counts`` of heads and columns by layer; the other layers get empty plans."""
    return [layer.plan(*counts.get(index, (0, 0))) for index, layer in enumerate(units)]


def block_weights(layers: nn.ModuleList, family: Family, shapes: list[LayerShape]) -> int:
    """Return the number of weights in the attention and MLP matrices of all layers."""
    return sum(
        weights_of(layer, family, LayerMask.dense(shape))[1] for layer, shape in zip(layers, shapes, strict=True)
    )


def cost_removed(counts: Sequence[Sequence[int]], units: list[LayerUnits]) -> int:
    """Return what ``counts`` of heads and columns of every layer count in the budget."""
    return sum(
        heads * layer.head_cost + columns * layer.column_cost
        for (heads, columns), layer in zip(counts, units, strict=True)
    )


class UnreachableTargetError(UserError):
    """A target that removes more than the layers have."""


def unreachable_target(most: float, budget: float) -> UnreachableTargetError:
    """Return the error for a target that removes ``budget``, of which only ``most`` can be removed."""
    return UnreachableTargetError(
        f"only {most / budget:.0%} of what the target removes can be removed; lower --target_ratio, raise "
        "--target_params, --target_macs, --target_memory or --target_latency, or prune more layers"
    )


def scaled_counts(
    schedule: Callable[[float], list[float]], units: list[LayerUnits], budget: float, uniform: bool = False
) -> list[list[int]]:
    """Return the heads and columns to remove from every layer by a schedule scaled to ``budget``.

    Args:
        schedule: maps the highest ratio to the ratios of all layers, which grow with it.
        units: units of every layer.
        budget: what to remove; met to within one FFN column or, if ``uniform``, one column of every layer.
            If too few columns are left to correct a step of heads, the nearest total of steps of single layers.
        uniform: layers with equal ratios lose equal counts.

    Raises:
        UnreachableTargetError: if the schedule cannot remove ``budget``.
    """

    def counts(highest: float) -> list[list[int]]:
        return [list(layer.removed_by(ratio)) for layer, ratio in zip(units, schedule(highest), strict=True)]

    most = cost_removed(counts(1.0), units)
    if most < budget:
        raise unreachable_target(most, budget)
    low, high = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_removed(counts(middle), units) < budget else (low, middle)
    if uniform:
        return counts(high)
    floor, ceiling = counts(low), counts(high)
    # The remainder between two steps of the schedule is filled with columns, from the last layer on.
    pruned = [index for index in reversed(range(len(units))) if any(ceiling[index])]
    candidate = nearest = _filled_in_turn(floor, units, pruned, budget)
    # If the columns are not enough, take the step's heads too, one layer at a time.
    for index in pruned:
        if cost_removed(candidate, units) >= budget:
            break
        floor[index] = ceiling[index]
        candidate = _filled_in_turn(floor, units, pruned, budget)
        nearest = min(nearest, candidate, key=lambda option: abs(cost_removed(option, units) - budget))
    return nearest


def _filled_in_turn(
    counts: list[list[int]], units: list[LayerUnits], layers: list[int], budget: float
) -> list[list[int]]:
    """Return ``counts`` with columns of ``layers`` added in turn up to the budget, or restored down to it."""
    counts = [list(pair) for pair in counts]
    left = budget - cost_removed(counts, units)
    while left > 0 and any(counts[index][1] < units[index].columns - 1 for index in layers):
        for index in layers:
            if left > 0 and counts[index][1] < units[index].columns - 1:
                counts[index][1] += 1
                left -= units[index].column_cost
    while any(counts[index][1] and units[index].column_cost <= -left for index in layers):
        for index in reversed(layers):
            if counts[index][1] and units[index].column_cost <= -left:
                counts[index][1] -= 1
                left += units[index].column_cost
    return counts


@dataclass(frozen=True)
class LossCurve:
    """Loss of the model as a function of the number of units removed, for the heads or the columns of one layer.

    Attributes:
        losses: (n,) loss with 0, 1, … units removed.
        cost: what one unit counts in the budget.
        column: whether the units are FFN columns.
    """

    losses: np.ndarray
    cost: int
    column: bool

    def scaled(self, factor: float) -> "LossCurve":
        """Return the curve with losses multiplied by ``factor``."""
        return replace(self, losses=self.losses * factor)


@dataclass(frozen=True)
class LayerCurves:
    """Loss curves of the heads and of the FFN columns of one layer."""

    heads: LossCurve
    columns: LossCurve


def allocate(curves: list[LossCurve], budget: float) -> list[int]:
    """Return the number of units to remove from every curve that minimises the sum of losses for ``budget``.

    For a Lagrange multiplier (loss per cost) every curve has its own best count, independent of the others; the
    multiplier that meets the budget is found by bisection. The budget is met to within one FFN column or, if too few
    columns are left, to within part of a head.

    Raises:
        UnreachableTargetError: if the curves cost less than ``budget``.
    """

    def best(multiplier: float) -> list[int]:
        return [
            int(np.argmin(curve.losses - multiplier * curve.cost * np.arange(len(curve.losses)))) for curve in curves
        ]

    def removed(counts: list[int]) -> int:
        return sum(count * curve.cost for count, curve in zip(counts, curves, strict=True))

    slopes = [curve.losses.max() / curve.cost for curve in curves if len(curve.losses) > 1]
    high = 2 * max(slopes, default=0.0) + 1e-12
    if removed(best(high)) < budget:
        raise unreachable_target(removed(best(high)), budget)
    low = 0.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(best(middle)) <= budget else (low, middle)
    # Columns fill the remainder on either side of the budget; then moves of single heads are tried.
    column = max((curve.cost for curve in curves if curve.column), default=0)

    def miss_and_loss(counts: list[int]) -> tuple[float, float]:
        loss = sum(curve.losses[count] for curve, count in zip(curves, counts, strict=True))
        excess = removed(counts) - budget
        return 0 if 0 <= excess < max(column, 1) else abs(excess), loss

    counts = min((_filled_by_loss(curves, best(bound), budget) for bound in (low, high)), key=miss_and_loss)
    while True:
        neighbours = [
            _filled_by_loss(curves, [*counts[:i], counts[i] + change, *counts[i + 1 :]], budget)
            for i, curve in enumerate(curves)
            for change in (1, -1)
            if not curve.column and 0 <= counts[i] + change < len(curve.losses)
        ]
        neighbour = min(neighbours, key=miss_and_loss, default=counts)
        if miss_and_loss(neighbour) >= miss_and_loss(counts):
            return counts
        counts = neighbour


def allocate_layers(layers: list[LayerCurves], budget: float) -> list[tuple[int, int]]:
    """Return the heads and columns to remove from every layer; :func:`allocate` on the curves of ``layers``."""
    counts = allocate([curve for layer in layers for curve in (layer.heads, layer.columns)], budget)
    return list(zip(counts[::2], counts[1::2], strict=True))


def allocate_with_depth_decay(layers: list[LayerCurves], budget: float) -> list[tuple[int, int]]:
    """Return the heads and columns to remove from every layer; :func:`allocate_layers` with losses that decay in depth.

    Losses measured on the dense model, one map at a time, are not additive: the more is removed in total, the less a
    loss in a late layer adds to the losses before it. The losses are weighted by 1 in the first layer, falling to
    ``exp(−DEPTH_DECAY · total)`` in the last, where the total is the sum of all losses without the decay.

    Args:
        layers: curves of the pruned layers in order.
        budget: what to remove.

    Raises:
        UnreachableTargetError: as :func:`allocate`.
    """
    total = sum(
        loss
        for layer, (heads, columns) in zip(layers, allocate_layers(layers, budget), strict=True)
        for loss in (layer.heads.losses[heads], layer.columns.losses[columns])
    )
    weights = np.exp(-DEPTH_DECAY * min(total, MAX_TOTAL_LOSS) * np.linspace(0, 1, len(layers)))
    decayed = [
        LayerCurves(layer.heads.scaled(weight), layer.columns.scaled(weight))
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return allocate_layers(decayed, budget)


def _filled_by_loss(curves: list[LossCurve], counts: list[int], budget: float) -> list[int]:
    """Return ``counts`` with the columns of least loss added up to the budget, or those of most loss restored."""
    counts = list(counts)
    left = budget - sum(count * curve.cost for count, curve in zip(counts, curves, strict=True))
    columns = [i for i, curve in enumerate(curves) if curve.column]

    def marginal_loss(i: int, count: int) -> float:
        """Loss added by the last of ``count`` columns."""
        return curves[i].losses[count] - curves[i].losses[count - 1]

    while left > 0 and (removable := [i for i in columns if counts[i] + 1 < len(curves[i].losses)]):
        cheapest = min(removable, key=lambda i: marginal_loss(i, counts[i] + 1))
        counts[cheapest] += 1
        left -= curves[cheapest].cost
    while restorable := [i for i in columns if counts[i] and curves[i].cost <= -left]:
        costliest = max(restorable, key=lambda i: marginal_loss(i, counts[i]))
        counts[costliest] -= 1
        left += curves[costliest].cost
    return counts


def read_profile(path: Path, units: list[LayerUnits], shapes: list[LayerShape]) -> list[LayerPlan]:
    """Return the plans in a ``pruning.json`` of another run on a model with the same layer shapes.

    Raises:
        UserError: if the file cannot be read, or its layer shapes or unit of heads differ.
    """
    try:
        masks = read_pruning(path)
    except UserError as error:
        raise UserError(f"--profile {error}") from None
    if [mask.shape for mask in masks] != shapes:
        raise UserError(f"--profile {path}: its layer shapes differ from this model's")
    plans = []
    for index, (mask, layer) in enumerate(zip(masks, units, strict=True)):
        plan = mask.plan
        if plan.experts:
            raise UserError(f"--profile {path}: removes whole experts; use --expert_unit expert with a ratio instead")
        if plan.heads % layer.heads_per_unit:
            difference = f"removes {plan.heads} heads, not a multiple of {layer.heads_per_unit}"
            raise UserError(f"--profile {path}: layer {index} {difference}; change --gqa_unit")
        plans.append(plan)
    return plans
