"""Sizes of decoder layers, and the numbers of devices that divide them; needs neither vLLM nor a model."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer that tensor parallelism divides.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        columns: intermediate columns of the FFN, or of one expert; 0 if experts are not divided.
    """

    heads: int
    kv_heads: int
    columns: int

    def indivisible(self, devices: int) -> str:
        """What ``devices`` devices cannot divide, with its number; empty if they divide the layer.

        vLLM divides query heads and columns evenly, and key/value heads evenly or by copies.
        """
        if self.heads % devices:
            return f"{self.heads} heads"
        if self.kv_heads % devices and devices % self.kv_heads:
            return f"{self.kv_heads} key/value heads"
        if self.columns % devices:
            return f"{self.columns} FFN columns"
        return ""


def layer_sizes(config: Any, experts_whole: bool = False) -> list[LayerSizes]:
    """Sizes of every layer.

    Args:
        config: configuration of the model, with ``per_layer_config``.
        experts_whole: every device has whole experts (expert parallelism).

    Raises:
        ValueError: if a layer has no head, key/value head or column, which vLLM cannot run.
    """
    sizes = []
    for index, layer in enumerate(config.per_layer_config):
        experts = _has_experts(layer, index)
        name = "moe_intermediate_size" if experts and hasattr(layer, "moe_intermediate_size") else "intermediate_size"
        kept = layer.num_attention_heads, layer.num_key_value_heads, getattr(layer, name)
        if min(kept) < 1:
            raise ValueError(f"layer {index} has {kept[0]} heads, {kept[1]} key/value heads and {kept[2]} FFN columns")
        sizes.append(LayerSizes(*kept[:2], 0 if experts and experts_whole else kept[2]))
    return sizes


def _has_experts(layer: Any, index: int) -> bool:
    """Whether layer ``index`` is a mixture of experts."""
    if not (hasattr(layer, "num_local_experts") or hasattr(layer, "num_experts")):
        return False
    dense = index in (getattr(layer, "mlp_only_layers", None) or ())
    return not dense and (index + 1) % getattr(layer, "decoder_sparse_step", 1) == 0


def check_tensor_parallel(sizes: list[LayerSizes], devices: int, dense_heads: int) -> None:
    """Check that ``devices`` devices divide every layer.

    Args:
        sizes: sizes of the layers.
        devices: ``--tensor-parallel-size``.
        dense_heads: query heads at the top level of the configuration, which vLLM divides too.

    Raises:
        ValueError: if they do not; names the layer and the largest smaller size that divides all layers.
    """
    for index, layer in enumerate(sizes):
        if what := layer.indivisible(devices):
            fitting = [
                n for n in range(1, devices) if dense_heads % n == 0 and not any(s.indivisible(n) for s in sizes)
            ]
            raise ValueError(
                f"--tensor-parallel-size {devices} does not divide the {what} of layer {index}; "
                f"use --tensor-parallel-size {max(fitting)}, or prune with --tp_size {devices}"
            )
