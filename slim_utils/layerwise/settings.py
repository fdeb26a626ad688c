"""Settings of the layer-wise pruner."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slim_utils.families import LayerShape
from slim_utils.layerwise.device_defaults import CPU_TOKENS_PER_FORWARD
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.obs import PAPER_SELECTION, SelectionOptions
from slim_utils.slimgpt import PruneResult, SlimGPT

GQA_UNITS = ("query_head", "kv_group")


@dataclass(frozen=True)
class PruningSettings:
    """How layers are pruned.

    Attributes:
        device: compute device; layers are onloaded to it one by one.
        cache_dev: device of the activations between layers.
        batch_samples: samples per forward at most.
        tokens_per_forward: tokens per forward at most, but at least one sample.
        percdamp: damping, as a share of the mean of the Hessian's diagonal.
        compensate: whether the remaining weights are updated.
        selection: how units are selected.
        gqa_unit: unit of heads with grouped-query attention, one of ``GQA_UNITS``: the same number of query heads of
            every kv group, whose key/value head stays, or whole kv groups.
        solve_dtype: precision of the solver, fp64, or fp32 where a device has slow fp64.
        whole_experts: whether MoE layers lose whole experts, and nothing else is pruned.
    """

    device: torch.device
    cache_dev: torch.device
    batch_samples: int = 128
    percdamp: float = 0.01
    compensate: bool = True
    selection: SelectionOptions = PAPER_SELECTION
    gqa_unit: str = "query_head"
    tokens_per_forward: int = CPU_TOKENS_PER_FORWARD
    solve_dtype: torch.dtype = torch.float64
    whole_experts: bool = False

    def struct_prune(
        self, pruner: SlimGPT, count: int, unit_size: int = 1, num_groups: int = 1, percdamp: float | None = None
    ) -> PruneResult:
        """:meth:`SlimGPT.struct_prune` with these settings; ``percdamp`` takes the place of theirs if given."""
        return pruner.struct_prune(
            count,
            unit_size,
            self.percdamp if percdamp is None else percdamp,
            self.compensate,
            num_groups,
            self.selection,
            self.solve_dtype,
        )

    def micro_batches(self, samples: Tensor) -> list[tuple[int, int]]:
        """Start and stop of each forward: at most ``batch_samples`` samples and ``tokens_per_forward``."""
        step = self._samples_at_once(samples)
        return [(start, min(start + step, len(samples))) for start in range(0, len(samples), step)]

    def _samples_at_once(self, samples: Tensor) -> int:
        return min(self.batch_samples, len(samples), max(1, self.tokens_per_forward // samples.shape[1]))

    def with_less_memory(self, samples: Tensor) -> "PruningSettings | None":
        """Settings that need less device memory: half the samples per forward; at one sample, activations on the host.

        ``None`` if nothing is left to reduce.
        """
        step = self._samples_at_once(samples)
        if step > 1:
            return replace(self, batch_samples=step // 2)
        return self.with_host_cache()

    def with_host_cache(self) -> "PruningSettings | None":
        """Settings with activations on the host; ``None`` if they are there already."""
        host = torch.device("cpu")
        return None if self.cache_dev == host else replace(self, cache_dev=host)

    def by_query_head(self, shape: LayerShape) -> bool:
        """Whether the unit of a layer of ``shape`` is a head of a group, be it a kv group or a block.

        Keys and values that layers share stay, whatever the unit.
        """
        return (
            shape.head_blocks > 1
            or bool(shape.kv_sharing)
            or (self.gqa_unit == "query_head" and shape.heads_per_group > 1)
        )

    def head_units(self, shape: LayerShape) -> int:
        """Units of heads of a layer of ``shape``: heads of a group, or kv groups."""
        return shape.num_heads // shape.head_groups if self.by_query_head(shape) else shape.num_kv_heads

    def heads_per_unit(self, shape: LayerShape) -> int:
        """Query heads of a unit: one of every group, or all of a kv group."""
        return shape.head_groups if self.by_query_head(shape) else shape.heads_per_group

    def size_mask(self, shape: LayerShape, plan: LayerPlan) -> LayerMask:
        """Size-only mask of a layer pruned by ``plan``; the choice of kept units is arbitrary."""
        width = shape.ffn_width - plan.columns
        ffns = range(shape.num_ffns - plan.experts)
        columns = [ffn * shape.ffn_width + i for ffn in ffns for i in range(width)]
        kept = self.head_units(shape) - plan.heads // self.heads_per_unit(shape)
        if self.by_query_head(shape):
            size = self.head_units(shape)
            heads = [group * size + i for group in range(shape.head_groups) for i in range(kept)]
            return LayerMask.from_heads(shape, heads, columns)
        return LayerMask.from_groups(shape, list(range(kept)), columns)
