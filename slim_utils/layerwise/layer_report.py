"""Report of one pruned layer."""

import json
from dataclasses import asdict, dataclass

from slim_utils.families import LayerShape
from slim_utils.masks import LayerMask
from slim_utils.slimgpt import PruneResult


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
    """

    layer: int
    mask: LayerMask
    attention: PruneResult
    mlp: PruneResult
    seconds: float
    peak_memory_mib: dict[str, float]
    batch_samples: int | None = None
    cache_dev: str | None = None

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
        return cls(mask=LayerMask(shape, **mask), attention=attention, mlp=mlp, **content)

    def log_line(self, num_layers: int) -> str:
        """One line: pruned heads and columns, errors before and after compensation, seconds, memory."""
        shape, mask, plan = self.mask.shape, self.mask, self.mask.plan
        peaks = ", ".join(f"{name} {mib / 1024:.2f} GiB" for name, mib in self.peak_memory_mib.items())
        ratios = plan.heads / shape.num_heads, plan.columns / shape.ffn_width
        heads = f"heads −{plan.heads}/{shape.num_heads}"
        columns = f"columns −{shape.num_columns - len(mask.kept_columns)}/{shape.num_columns}"
        return (
            f"layer {self.layer}/{num_layers} ratio {'/'.join(f'{ratio:.4f}' for ratio in dict.fromkeys(ratios))}: "
            f"{heads} {_error_change(self.attention)}, {columns} {_error_change(self.mlp)}, "
            f"{self.seconds:.1f} s, peak {peaks}"
        )


def _error_change(result: PruneResult) -> str:
    return f"error {result.error_uncompensated:.2e} → {result.error_compensated:.2e}"
