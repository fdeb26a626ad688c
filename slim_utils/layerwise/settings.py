"""How the layers of a model are pruned."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slim_utils.families import LayerShape
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.obs import PAPER_SELECTION, SelectionOptions

TOKENS_PER_FORWARD = 4096
GQA_UNITS = ("query_head", "kv_group")


@dataclass(frozen=True)
class PruningSettings:
    """How layers are pruned.

    Attributes:
        device: where layers are run and pruned; a layer is moved there and back.
        cache_dev: where the activations between layers are kept.
        batch_samples: samples brought from ``cache_dev`` to ``device`` at once.
        percdamp: damping, as a share of the mean of the Hessian's diagonal.
        compensate: whether the remaining weights are updated.
        selection: how units are chosen.
        gqa_unit: what goes where query heads share key/value heads, one of ``GQA_UNITS``: equally many query heads of
            every group, whose key/value head stays, or whole kv groups.
        solve_dtype: precision of the solver, fp64, or fp32 where a device has slow fp64.
    """

    device: torch.device
    cache_dev: torch.device
    batch_samples: int = 128
    percdamp: float = 0.01
    compensate: bool = True
    selection: SelectionOptions = PAPER_SELECTION
    gqa_unit: str = "query_head"
    solve_dtype: torch.dtype = torch.float64

    def micro_batches(self, samples: Tensor) -> list[tuple[int, int]]:
        """Samples of each forward: at most ``batch_samples``, or as many as make ``TOKENS_PER_FORWARD``."""
        step = self._samples_at_once(samples)
        return [(start, min(start + step, len(samples))) for start in range(0, len(samples), step)]

    def _samples_at_once(self, samples: Tensor) -> int:
        return min(self.batch_samples, len(samples), max(1, TOKENS_PER_FORWARD // samples.shape[1]))

    def with_less_memory(self, samples: Tensor) -> "PruningSettings | None":
        """Settings that ask less memory of the device: half the samples at once, at one sample activations on the host.

        ``None`` where there is nothing left to give up.
        """
        step = self._samples_at_once(samples)
        if step > 1:
            return replace(self, batch_samples=step // 2)
        return self.with_host_cache()

    def with_host_cache(self) -> "PruningSettings | None":
        """Settings that keep activations on the host; ``None`` where they are there already."""
        host = torch.device("cpu")
        return None if self.cache_dev == host else replace(self, cache_dev=host)

    def by_query_head(self, shape: LayerShape) -> bool:
        """Whether the unit of a layer of ``shape`` is a query head of a group."""
        return self.gqa_unit == "query_head" and shape.heads_per_group > 1

    def head_units(self, shape: LayerShape) -> int:
        """What of the heads of a layer of ``shape`` can go one after another: query heads of a group, or kv groups."""
        return shape.heads_per_group if self.by_query_head(shape) else shape.num_kv_heads

    def heads_per_unit(self, shape: LayerShape) -> int:
        """Query heads of such a unit: one of every kv group, or all of one."""
        return shape.num_kv_heads if self.by_query_head(shape) else shape.heads_per_group

    def size_mask(self, shape: LayerShape, plan: LayerPlan) -> LayerMask:
        """A mask of the sizes that ``plan`` leaves; which units it keeps is arbitrary."""
        width = shape.ffn_width - plan.columns
        columns = [ffn * shape.ffn_width + i for ffn in range(shape.num_ffns) for i in range(width)]
        kept = self.head_units(shape) - plan.heads // self.heads_per_unit(shape)
        if self.by_query_head(shape):
            size = shape.heads_per_group
            heads = [group * size + i for group in range(shape.num_kv_heads) for i in range(kept)]
            return LayerMask.from_heads(shape, heads, columns)
        return LayerMask.from_groups(shape, list(range(kept)), columns)
