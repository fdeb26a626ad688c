"""Alignment of plans: every pruned layer keeps a multiple of heads and of FFN columns."""

import logging
import math
from dataclasses import dataclass

from slim_utils.allocation.budget import LayerUnits
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """Multiples of heads and FFN columns that pruned layers keep.

    Attributes:
        heads_multiple: multiple of heads, or of kv groups if those are the unit.
        columns_multiple: multiple of FFN columns, or of experts where they are removed as a whole.
        expert_columns_multiple: additional multiple for the columns of each expert; the grouped matrix products of
            transformers need rows of 16 bytes.
        tp_size: tensor-parallel GPUs; key/value heads are split over them, or replicated on several.
        uniform: layers with equal plans keep equal shapes, and FFNs n times as wide n times the columns; no layer
            gets a left-over multiple.
    """

    heads_multiple: int = 1
    columns_multiple: int = 1
    expert_columns_multiple: int = 8
    tp_size: int = 1
    uniform: bool = False

    def multiples(self, layer: LayerUnits) -> tuple[int, int]:
        """Return the multiples of heads, or kv groups, and of columns, or experts, that ``layer`` keeps."""
        of_experts = layer.num_experts and not layer.whole_experts
        return (
            self.heads_multiple // math.gcd(self.heads_multiple, layer.head_groups),
            math.lcm(self.columns_multiple, self.expert_columns_multiple if of_experts else 1),
        )

    def aligned(
        self, plans: list[LayerPlan], units: list[LayerUnits], pruned: list[tuple[bool, bool]]
    ) -> list[LayerPlan]:
        """Return ``plans`` rounded to the multiples; the total removed changes by less than one multiple.

        Args:
            plans: plan of every layer.
            units: units of every layer.
            pruned: whether the heads and whether the columns of each layer are pruned; the others are not aligned.
        """
        counts = [layer.counts(plan) for layer, plan in zip(units, plans, strict=True)]
        multiples = [self.multiples(layer) for layer in units]
        heads = aligned_counts(
            [count for count, _ in counts],
            [layer.heads for layer in units],
            [multiple for multiple, _ in multiples],
            [flag for flag, _ in pruned],
            self.uniform,
        )
        columns = [count for _, count in counts]
        for num_experts in {layer.num_experts for layer in units}:
            # Left-over columns move only between layers whose columns have the same number of weights.
            indices = [index for index, layer in enumerate(units) if layer.num_experts == num_experts]
            aligned_columns = aligned_counts(
                [columns[i] for i in indices],
                [units[i].columns for i in indices],
                [multiples[i][1] for i in indices],
                [pruned[i][1] for i in indices],
                self.uniform,
            )
            if self.uniform:
                aligned_columns = proportional_counts(
                    aligned_columns,
                    [units[i].columns for i in indices],
                    [multiples[i][1] for i in indices],
                    [pruned[i][1] for i in indices],
                )
            for index, count in zip(indices, aligned_columns, strict=True):
                columns[index] = count
        return [layer.plan(*removed) for layer, *removed in zip(units, heads, columns, strict=True)]

    def warn_of_unaligned(self, masks: list[LayerMask], settings: PruningSettings) -> None:
        """Log the layers whose heads, key/value heads or columns are not aligned."""
        unaligned = []
        for index, mask in enumerate(masks):
            kept = mask.kept_heads if settings.by_query_head(mask.shape) else mask.kept_kv_heads
            kv_heads = len(mask.kept_kv_heads)
            splits = kv_heads % self.tp_size == 0 or (kv_heads and self.tp_size % kv_heads == 0)
            columns = len(mask.kept_experts) if settings.whole_experts else mask.kept_width
            if len(kept) % self.heads_multiple or columns % self.columns_multiple or not splits:
                unaligned.append(str(index))
        if unaligned:
            message = "layers %s cannot be aligned: heads and key/value heads to %d, %s to %d"
            columns_name = "experts" if settings.whole_experts else "FFN columns"
            logger.warning(message, ", ".join(unaligned), self.heads_multiple, columns_name, self.columns_multiple)


def aligned_counts(
    removed: list[int], totals: list[int], multiples: list[int], pruned: list[bool], uniform: bool = False
) -> list[int]:
    """Return counts to remove that leave a multiple of units in every pruned layer.

    The total kept changes by less than one multiple: every layer is rounded down, and the left-over multiples go to the
    layers with the largest remainders.

    Args:
        removed: units to remove from every layer.
        totals: units of every layer; a layer with fewer units than its multiple is not aligned.
        multiples: multiple of every layer, at least 1.
        pruned: whether to align each layer.
        uniform: drop the left-over multiples.
    """
    kept = [total - count for count, total in zip(removed, totals, strict=True)]
    layers = [i for i, flag in enumerate(pruned) if flag and totals[i] >= multiples[i]]
    aligned = {i: max(kept[i] // multiples[i], 1) * multiples[i] for i in layers}
    spare = 0 if uniform else sum(kept[i] - aligned[i] for i in layers)
    for i in sorted(layers, key=lambda i: aligned[i] - kept[i]):
        if spare >= multiples[i] and aligned[i] + multiples[i] <= totals[i]:
            aligned[i] += multiples[i]
            spare -= multiples[i]
    return [totals[i] - aligned[i] if i in aligned else count for i, count in enumerate(removed)]


def proportional_counts(removed: list[int], totals: list[int], multiples: list[int], pruned: list[bool]) -> list[int]:
    """Return ``removed``, with n times the count of the narrowest layer for layers that are n times as wide.

    Counts that differ from that by more than rounding stay. Arguments are those of :func:`aligned_counts`.
    """
    narrowest = totals.index(min(totals))
    counts = list(removed)
    for i, total in enumerate(totals):
        times, rest = divmod(total, totals[narrowest])
        proportional = times * removed[narrowest]
        rounded = abs(proportional - removed[i]) <= times * multiples[i]
        if times > 1 and rest == 0 and rounded and pruned[i] and pruned[narrowest]:
            counts[i] = proportional
    return counts
