"""What happened to one layer."""

import json
from dataclasses import asdict, dataclass

from slim_utils.families import LayerShape
from slim_utils.masks import LayerMask
from slim_utils.slimgpt import PruneResult


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        layer: its index.
        mask: what it keeps.
        attention: the result of the attention's output map.
        mlp: that of the FFN's.
        seconds: it took.
        peak_memory_mib: of the process so far, by host and GPU.
        batch_samples: samples at once at its end, fewer than asked where the device's memory was full.
        cache_dev: where activations were then.
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
        """One line: heads and columns that went, errors before and after compensation, seconds, memory."""
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
