"""Report of one pruned layer."""

import json
from dataclasses import asdict, dataclass

from slim_utils.families import LayerShape
from slim_utils.masks import LayerMask
from slim_utils.slimgpt import PruneResult


@dataclass(frozen=True)
class ExpertRefit:
    """Removal of whole experts of one layer, and the refit of the others.

    Attributes:
        scores: REAP score of every expert.
        removed: experts that were removed.
        refitted: experts whose refit was kept.
        held_out_error_before: squared error of the layer's output on the held-out samples, as a share of its energy.
        held_out_error_after: the same after the refit.
    """

    scores: list[float]
    removed: list[int]
    refitted: list[int]
    held_out_error_before: float
    held_out_error_after: float


@dataclass(frozen=True)
class LayerReport:
    """Report of one pruned layer.

    Attributes:
        layer: index.
        mask: kept heads and columns.
        attention: result of pruning the attention's output map.
        mlp: result of pruning the FFN's output map.
        seconds: duration.
        peak_memory_mib: peak of the process so far, by host and GPU.
        batch_samples: samples per forward at the end of the layer; below the requested number after an out-of-memory
            error.
        cache_dev: device of the activations at the end of the layer.
        experts: what whole experts were removed and refitted, if that is the unit.
        shared: result of pruning the shared expert's output map, if there is one that loses columns.
    """

    layer: int
    mask: LayerMask
    attention: PruneResult
    mlp: PruneResult
    seconds: float
    peak_memory_mib: dict[str, float]
    batch_samples: int | None = None
    cache_dev: str | None = None
    experts: ExpertRefit | None = None
    shared: PruneResult | None = None

    def to_json(self) -> str:
        """As json."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LayerReport":
        """The report that :meth:`to_json` wrote."""
        content = json.loads(text)
        mask = content.pop("mask")
        shape = LayerShape(**mask.pop("shape"))
        attention, mlp = (PruneResult(**content.pop(name)) for name in ("attention", "mlp"))
        # Layers of earlier versions have none.
        refit, result = content.pop("experts", None), content.pop("shared", None)
        experts, shared = ExpertRefit(**refit) if refit else None, PruneResult(**result) if result else None
        mask = LayerMask(shape, **mask)
        return cls(mask=mask, attention=attention, mlp=mlp, experts=experts, shared=shared, **content)

    def log_line(self, num_layers: int) -> str:
        """One line: pruned heads and columns, or experts, errors before and after compensation, seconds, memory."""
        shape, mask, plan = self.mask.shape, self.mask, self.mask.plan
        peaks = ", ".join(f"{name} {mib / 1024:.2f} GiB" for name, mib in self.peak_memory_mib.items())
        if self.experts:
            ratios: tuple[float, ...] = (plan.experts / shape.num_experts,)
            units = (
                f"experts −{plan.experts}/{shape.num_experts} ({', '.join(map(str, self.experts.removed))}) "
                f"{_error_change(self.mlp)}, refitted {len(self.experts.refitted)}/{len(mask.kept_experts)}"
            )
        else:
            parts = []
            if shape.num_heads:
                parts.append(f"heads −{plan.heads}/{shape.num_heads} {_error_change(self.attention)}")
            if shape.num_columns:
                removed = shape.num_columns - len(mask.kept_columns)
                parts.append(f"columns −{removed}/{shape.num_columns} {_error_change(self.mlp)}")
            units = ", ".join(parts)
            pairs = ((plan.heads, shape.num_heads), (plan.columns, shape.ffn_width))
            ratios = tuple(count / total for count, total in pairs if total)
        if shape.num_shared_columns:
            removed = shape.num_shared_columns - len(mask.kept_shared)
            units += f", shared expert −{removed}/{shape.num_shared_columns}"
            units += f" {_error_change(self.shared)}" if self.shared else ""
        ratio = "/".join(f"{ratio:.4f}" for ratio in dict.fromkeys(ratios))
        return f"layer {self.layer}/{num_layers} ratio {ratio}: {units}, {self.seconds:.1f} s, peak {peaks}"


def _error_change(result: PruneResult) -> str:
    return f"error {result.error_uncompensated:.2e} → {result.error_compensated:.2e}"
