"""Which layers lose how much, for a budget of weights: by a schedule, by another run's, or where it costs least."""

from collections.abc import Callable
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

# Bisections of a price or a ratio; each halves what is left of the interval.
BISECTION_STEPS = 60
# Chosen on calibration text alone, SmolLM2-135M at 20, 33 and 50 %, where losses add up to 0.1 to 0.5 nats; beyond
# twice as much the decay stays as it is.
DEPTH_DECAY, LARGEST_TOTAL = 1.5, 1.0


@dataclass(frozen=True)
class LayerUnits:
    """What of one layer can be removed, in units of its heads and of its FFN columns.

    Attributes:
        heads: query heads of a kv group, or kv groups; one stays.
        columns: of its FFN, or of each expert; one stays.
        head_weights: block weights that are removed with one unit of heads.
        column_weights: with one of the columns.
        heads_per_unit: query heads of one unit.
        head_groups: kv groups that one unit is spread over.
        num_experts: of the layer; 0 where it has an ordinary FFN.
    """

    heads: int
    columns: int
    head_weights: int
    column_weights: int
    heads_per_unit: int = 1
    head_groups: int = 1
    num_experts: int = 0

    def plan(self, heads: int, columns: int) -> LayerPlan:
        """The plan that removes so many units of each."""
        return LayerPlan(heads * self.heads_per_unit, columns)

    def counts(self, plan: LayerPlan) -> tuple[int, int]:
        """Units of each that ``plan`` removes."""
        return plan.heads // self.heads_per_unit, plan.columns

    def removed_by(self, ratio: float) -> tuple[int, int]:
        """Units of each that a ratio removes."""
        return units_to_remove(self.heads, ratio), units_to_remove(self.columns, ratio)


def layer_units(
    layers: nn.ModuleList, family: Family, shapes: list[LayerShape], settings: PruningSettings
) -> list[LayerUnits]:
    """Units of every layer, and what they weigh; parameters may be on the meta device."""
    units = []
    for layer, shape in zip(layers, shapes, strict=True):
        heads, per_unit = settings.head_units(shape), settings.heads_per_unit(shape)
        single = LayerPlan(per_unit if heads > 1 else 0, 0), LayerPlan(0, 1)
        head_weights, column_weights = (
            weights_of(layer, family, settings.size_mask(shape, plan))[0] for plan in single
        )
        groups = shape.num_kv_heads if settings.by_query_head(shape) else 1
        units.append(
            LayerUnits(heads, shape.ffn_width, head_weights, column_weights, per_unit, groups, shape.num_experts)
        )
    return units


def plans_of_counts(counts: dict[int, tuple[int, int]], units: list[LayerUnits]) -> list[LayerPlan]:
    """Plans that remove so many units of heads and of columns, by layer; an empty one of every other layer."""
    return [own.plan(*counts.get(index, (0, 0))) for index, own in enumerate(units)]


def block_weights(layers: nn.ModuleList, family: Family, shapes: list[LayerShape]) -> int:
    """Weights of the attention and MLP matrices of all layers."""
    return sum(weights_of(layer, family, LayerMask.dense(own))[1] for layer, own in zip(layers, shapes, strict=True))


def scaled_counts(
    schedule: Callable[[float], list[float]], units: list[LayerUnits], budget: float, alike: bool = False
) -> list[list[int]]:
    """Units of heads and of columns of every layer that a schedule removes, its highest ratio chosen for ``budget``.

    Args:
        schedule: ratios of all layers for a highest one; they grow with it.
        units: of every layer.
        budget: block weights to remove; met to one FFN column or, if ``alike``, to one of every layer. Where too few
            columns are left to make up for a step of heads, as near as steps of heads layer by layer come.
        alike: layers of one ratio lose equally many.

    Raises:
        UserError: if the schedule cannot remove so many.
    """

    def counts(highest: float) -> list[list[int]]:
        return [list(own.removed_by(ratio)) for own, ratio in zip(units, schedule(highest), strict=True)]

    most = weights_removed(counts(1.0), units)
    if most < budget:
        raise UserError(f"the layers to prune cannot lose {budget:.0f} weights; lower the target or prune more layers")
    low, high = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if weights_removed(counts(middle), units) < budget else (low, middle)
    if alike:
        return counts(high)
    floor, ceiling = counts(low), counts(high)
    # What the next step of the schedule would overshoot goes column by column, from the last layer on.
    pruned = [index for index in reversed(range(len(units))) if any(ceiling[index])]
    chosen = nearest = _settled_in_turn(floor, units, pruned, budget)
    # Where the columns do not do, the step's heads go too, a layer at a time.
    for index in pruned:
        if weights_removed(chosen, units) >= budget:
            break
        floor[index] = ceiling[index]
        chosen = _settled_in_turn(floor, units, pruned, budget)
        nearest = min(nearest, chosen, key=lambda found: abs(weights_removed(found, units) - budget))
    return nearest


def _settled_in_turn(
    counts: list[list[int]], units: list[LayerUnits], layers: list[int], budget: float
) -> list[list[int]]:
    """``counts`` with columns added in turn to ``layers`` up to the budget, or given back down to it."""
    counts = [list(own) for own in counts]
    left = budget - weights_removed(counts, units)
    while left > 0 and any(counts[index][1] < units[index].columns - 1 for index in layers):
        for index in layers:
            if left > 0 and counts[index][1] < units[index].columns - 1:
                counts[index][1] += 1
                left -= units[index].column_weights
    while any(counts[index][1] and units[index].column_weights <= -left for index in layers):
        for index in reversed(layers):
            if counts[index][1] and units[index].column_weights <= -left:
                counts[index][1] -= 1
                left += units[index].column_weights
    return counts


def weights_removed(counts: list[list[int]], units: list[LayerUnits]) -> int:
    """Block weights that go with so many units of heads and of columns of every layer."""
    return sum(
        heads * own.head_weights + columns * own.column_weights
        for (heads, columns), own in zip(counts, units, strict=True)
    )


@dataclass(frozen=True)
class LossCurve:
    """What it costs that more and more units of one kind go of one layer.

    Attributes:
        losses: loss of 0, 1, … units.
        weight: block weights of a unit.
        column: whether units are FFN columns.
    """

    losses: np.ndarray
    weight: int
    column: bool


def allocate(curves: list[LossCurve], budget: float) -> list[int]:
    """Units of every curve that go, so that the losses add up to the least for ``budget`` weights, to one FFN column.

    At a price of a weight every curve has its own best count, independent of the others; the price that nearly meets
    the budget is found by bisection (Lagrange). Where too few columns are left, the budget may be missed by part of a
    head.

    Raises:
        UserError: if all of the curves together have fewer weights.
    """

    def best(price: float) -> list[int]:
        return [int(np.argmin(curve.losses - price * curve.weight * np.arange(len(curve.losses)))) for curve in curves]

    def removed(counts: list[int]) -> int:
        return sum(count * curve.weight for count, curve in zip(counts, curves, strict=True))

    slopes = [curve.losses.max() / curve.weight for curve in curves if len(curve.losses) > 1]
    high = 2 * max(slopes, default=0.0) + 1e-12
    if removed(best(high)) < budget:
        raise UserError(f"no more than {removed(best(high))} block weights can go, of {budget:.0f}; lower the target")
    low = 0.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(best(middle)) <= budget else (low, middle)
    # Short of the budget, or beyond it, the rest goes or comes back column by column; then single heads are tried.
    column = max((curve.weight for curve in curves if curve.column), default=0)

    def missed_and_loss(counts: list[int]) -> tuple[float, float]:
        loss = sum(curve.losses[count] for curve, count in zip(curves, counts, strict=True))
        beyond = removed(counts) - budget
        return 0 if 0 <= beyond < max(column, 1) else abs(beyond), loss

    chosen = min((_settled(curves, best(price), budget) for price in (low, high)), key=missed_and_loss)
    while True:
        others = [
            _settled(curves, [*chosen[:i], chosen[i] + change, *chosen[i + 1 :]], budget)
            for i, curve in enumerate(curves)
            for change in (1, -1)
            if not curve.column and 0 <= chosen[i] + change < len(curve.losses)
        ]
        other = min(others, key=missed_and_loss, default=chosen)
        if missed_and_loss(other) >= missed_and_loss(chosen):
            return chosen
        chosen = other


def allocate_in_depth(layers: list[tuple[LossCurve, LossCurve]], budget: float) -> list[tuple[int, int]]:
    """Heads and columns of every layer that go; :func:`allocate`, with losses that count less from layer to layer.

    Losses measured on the dense model, one at a time, do not quite add up: the more goes in all, the less a loss in a
    late layer adds to those before it. From the first to the last layer their weight falls to
    ``exp(−DEPTH_DECAY · total)``, where the total is what all losses would add up to.

    Args:
        layers: curves of the heads and of the columns of layers in their order.
        budget: block weights to remove.

    Raises:
        UserError: as :func:`allocate`.
    """
    curves = [curve for pair in layers for curve in pair]
    total = sum(curve.losses[count] for curve, count in zip(curves, allocate(curves, budget), strict=True))
    weights = np.exp(-DEPTH_DECAY * min(total, LARGEST_TOTAL) * np.linspace(0, 1, len(layers)))
    faded = [replace(curve, losses=curve.losses * weights[i // 2]) for i, curve in enumerate(curves)]
    counts = allocate(faded, budget)
    return list(zip(counts[::2], counts[1::2], strict=True))


def _settled(curves: list[LossCurve], counts: list[int], budget: float) -> list[int]:
    """``counts`` with the columns that cost least added up to the budget, or those that cost most given back."""
    counts = list(counts)
    left = budget - sum(count * curve.weight for count, curve in zip(counts, curves, strict=True))
    columns = [i for i, curve in enumerate(curves) if curve.column]

    def rise(i: int, count: int) -> float:
        """What the last of so many columns costs."""
        return curves[i].losses[count] - curves[i].losses[count - 1]

    while left > 0 and (more := [i for i in columns if counts[i] + 1 < len(curves[i].losses)]):
        cheapest = min(more, key=lambda i: rise(i, counts[i] + 1))
        counts[cheapest] += 1
        left -= curves[cheapest].weight
    while fewer := [i for i in columns if counts[i] and curves[i].weight <= -left]:
        dearest = max(fewer, key=lambda i: rise(i, counts[i]))
        counts[dearest] -= 1
        left += curves[dearest].weight
    return counts


def read_profile(path: Path, units: list[LayerUnits], shapes: list[LayerShape]) -> list[LayerPlan]:
    """Plans that keep as much of every layer as a ``pruning.json`` of another run on the same shapes does.

    Raises:
        UserError: if the file cannot be read, or is of a model of other shapes, or of other units of heads.
    """
    try:
        masks = read_pruning(path)
    except UserError as error:
        raise UserError(f"--profile {error}") from None
    if [mask.shape for mask in masks] != shapes:
        raise UserError(f"--profile {path}: of a model of other shapes")
    plans = []
    for index, (mask, own) in enumerate(zip(masks, units, strict=True)):
        plan = mask.plan
        if plan.heads % own.heads_per_unit:
            raise UserError(f"--profile {path}: layer {index} keeps other units of heads; see --gqa_unit")
        plans.append(plan)
    return plans
