"""Alignment of plans: every layer keeps a multiple of heads and of FFN columns."""

import logging
import math
from dataclasses import dataclass

from slim_utils.allocation.budget import LayerUnits
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """Multiples that layers keep.

    Attributes:
        heads_multiple: of heads, or of kv groups where those are the unit.
        columns_multiple: of FFN columns.
        expert_columns_multiple: of the columns of every expert besides; the library's grouped products of experts need
            rows of 16 bytes.
        tp_size: tensor-parallel GPUs; key/value heads are spread over them, several on one or one on several.
        uniform: layers of equal plans stay equal: no layer gets a multiple that others leave over.
    """

    heads_multiple: int = 1
    columns_multiple: int = 1
    expert_columns_multiple: int = 8
    tp_size: int = 1
    uniform: bool = False

    def aligned(
        self, plans: list[LayerPlan], units: list[LayerUnits], pruned: list[tuple[bool, bool]]
    ) -> list[LayerPlan]:
        """Plans that keep the multiples; all layers together remove as much, to less than a multiple.

        Args:
            plans: of every layer.
            units: of every layer.
            pruned: whether the heads and whether the columns of a layer are pruned at all; others stay as they are.
        """
        counts = [own.counts(plan) for own, plan in zip(units, plans, strict=True)]
        multiples = [self.heads_multiple // math.gcd(self.heads_multiple, own.head_groups) for own in units]
        heads = aligned_counts(
            [count for count, _ in counts],
            [own.heads for own in units],
            multiples,
            [flag for flag, _ in pruned],
            self.uniform,
        )
        columns = [count for _, count in counts]
        for experts in {own.num_experts for own in units}:
            # A column of as many experts weighs as much in each of these layers, and no other layer makes up for it.
            chosen = [index for index, own in enumerate(units) if own.num_experts == experts]
            multiple = math.lcm(self.columns_multiple, self.expert_columns_multiple if experts else 1)
            found = aligned_counts(
                [columns[i] for i in chosen],
                [units[i].columns for i in chosen],
                [multiple] * len(chosen),
                [pruned[i][1] for i in chosen],
                self.uniform,
            )
            for index, count in zip(chosen, found, strict=True):
                columns[index] = count
        return [own.plan(*pair) for own, pair in zip(units, zip(heads, columns, strict=True), strict=True)]

    def warn_of_unaligned(self, masks: list[LayerMask], settings: PruningSettings) -> None:
        """Log which layers end with heads or columns that are no multiples."""
        unaligned = []
        for index, mask in enumerate(masks):
            kept = mask.kept_heads if settings.by_query_head(mask.shape) else mask.kept_kv_heads
            kv_heads = len(mask.kept_kv_heads)
            spread = kv_heads % self.tp_size == 0 or self.tp_size % kv_heads == 0
            if len(kept) % self.heads_multiple or mask.kept_width % self.columns_multiple or not spread:
                unaligned.append(str(index))
        if unaligned:
            message = "layers %s end with heads, key/value heads or columns that do not divide by %d and %d"
            logger.warning(message, ", ".join(unaligned), self.heads_multiple, self.columns_multiple)


def aligned_counts(
    removed: list[int], totals: list[int], multiples: list[int], pruned: list[bool], uniform: bool = False
) -> list[int]:
    """Counts to remove that leave a multiple of units in every pruned layer.

    All layers together keep as many units as without it, up to less than a multiple. Whole multiples that are left
    over go to the layers that rounding down cost most.

    Args:
        removed: units to remove of every layer.
        totals: units of every layer; one with fewer than its multiple is left as it is.
        multiples: of every layer, at least 1.
        pruned: layers that are aligned.
        uniform: no layer gets a multiple that was left over.
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
