"""How to walk over the layers of a model."""

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slim_utils.allocation.schedules import LayerRatio, aligned_ratios
from slim_utils.families import LayerShape
from slim_utils.masks import LayerMask
from slim_utils.obs import PAPER_CHOICES, Choices

logger = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 4096
GQA_UNITS = ("query_head", "kv_group")


@dataclass(frozen=True)
class WalkSettings:
    """How to walk.

    Attributes:
        device: where layers are run and pruned; a layer is moved there and back.
        cache_dev: where the activations between layers are kept.
        batch_samples: samples brought from ``cache_dev`` to ``device`` at once.
        percdamp: damping, as a share of the mean of the Hessian's diagonal.
        compensate: whether the remaining weights are updated.
        choices: how units are chosen.
        gqa_unit: what goes where query heads share key/value heads, one of ``GQA_UNITS``: equally many query heads of
            every group, whose key/value head stays, or whole kv groups.
        heads_multiple: every layer keeps a multiple of so many heads, or kv groups where those are the unit.
        columns_multiple: every layer keeps a multiple of so many FFN columns.
        expert_columns_multiple: of the columns of every expert besides; the library's grouped products of experts want
            rows of 16 bytes.
        tp_size: GPUs that key/value heads have to be dealt out to, several to one or one to several.
        alike: layers of one ratio keep equally many, whatever the multiples leave over.
    """

    device: torch.device
    cache_dev: torch.device
    batch_samples: int = 128
    percdamp: float = 0.01
    compensate: bool = True
    choices: Choices = PAPER_CHOICES
    gqa_unit: str = "query_head"
    heads_multiple: int = 1
    columns_multiple: int = 1
    expert_columns_multiple: int = 8
    tp_size: int = 1
    alike: bool = False

    def spans(self, samples: Tensor) -> list[tuple[int, int]]:
        """Samples of each forward: at most ``batch_samples``, or as many as make ``TOKENS_PER_FORWARD``."""
        step = self._samples_at_once(samples)
        return [(start, min(start + step, len(samples))) for start in range(0, len(samples), step)]

    def _samples_at_once(self, samples: Tensor) -> int:
        return min(self.batch_samples, len(samples), max(1, TOKENS_PER_FORWARD // samples.shape[1]))

    def relieved(self, samples: Tensor) -> "WalkSettings | None":
        """Settings that ask less memory of the device: half the samples at once, at one sample activations on the host.

        ``None`` where there is nothing left to give up.
        """
        step = self._samples_at_once(samples)
        if step > 1:
            return replace(self, batch_samples=step // 2)
        return self.hosted()

    def hosted(self) -> "WalkSettings | None":
        """Settings that keep activations on the host; ``None`` where they are there already."""
        host = torch.device("cpu")
        return None if self.cache_dev == host else replace(self, cache_dev=host)

    def by_query_head(self, shape: LayerShape) -> bool:
        """Whether the unit of a layer of ``shape`` is a query head of a group."""
        return self.gqa_unit == "query_head" and shape.heads_per_group > 1

    def head_units(self, shape: LayerShape) -> int:
        """What of the heads of a layer of ``shape`` can go one after another: query heads of a group, or kv groups."""
        return shape.heads_per_group if self.by_query_head(shape) else shape.num_kv_heads

    def aligned(self, shapes: list[LayerShape], ratios: list[LayerRatio]) -> list[LayerRatio]:
        """Ratios of every layer that keep the multiples asked."""
        units, multiples = [], []
        for shape in shapes:
            groups, multiple = shape.num_kv_heads, self.heads_multiple
            units.append(self.head_units(shape))
            multiples.append(multiple // math.gcd(multiple, groups) if self.by_query_head(shape) else multiple)
        heads = aligned_ratios([ratio.heads for ratio in ratios], units, multiples, self.alike)
        columns = [ratio.columns for ratio in ratios]
        for experts in {shape.num_experts for shape in shapes}:
            # A column of as many experts weighs as much in each of these layers, and none of the others make up for it.
            chosen = [index for index, shape in enumerate(shapes) if shape.num_experts == experts]
            multiple = math.lcm(self.columns_multiple, self.expert_columns_multiple if experts else 1)
            widths = [shapes[index].ffn_width for index in chosen]
            own = aligned_ratios([columns[i] for i in chosen], widths, [multiple] * len(chosen), self.alike)
            for index, ratio in zip(chosen, own, strict=True):
                columns[index] = ratio
        return [LayerRatio(*pair) for pair in zip(heads, columns, strict=True)]

    def warn_of_unaligned(self, masks: list[LayerMask]) -> None:
        """Say which layers end with heads or columns that are not the multiples asked."""
        uneven = []
        for index, mask in enumerate(masks):
            kept = mask.kept_heads if self.by_query_head(mask.shape) else mask.kept_kv_heads
            kv_heads = len(mask.kept_kv_heads)
            dealt = kv_heads % self.tp_size == 0 or self.tp_size % kv_heads == 0
            if len(kept) % self.heads_multiple or mask.kept_width % self.columns_multiple or not dealt:
                uneven.append(str(index))
        if uneven:
            message = "layers %s end with heads, key/value heads or columns that do not divide by %d and %d"
            logger.warning(message, ", ".join(uneven), self.heads_multiple, self.columns_multiple)
