"""Sizes of a model: parameters, multiply-accumulates, memory, and the share of the block weights removed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slim_utils.common.loading import model_on_meta
from slim_utils.families import Family, LayerShape, find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import count_weights, kept_indices, router_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LayerStats:
    """Sizes of one decoder layer.

    Attributes:
        shape: heads, kv heads and FFN columns.
        parameters: parameters of the layer, including norms and biases.
        macs: multiply-accumulates of the counted forward.
        kv_cache_bytes: bytes of the KV cache per token.
    """

    shape: LayerShape
    parameters: int
    macs: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class ModelStats:
    """Sizes of a causal language model.

    Attributes:
        parameters: parameters; tied ones count once.
        macs: multiply-accumulates of the counted forward, including logits.
        weight_bytes: bytes of the parameters.
        layers: one entry per decoder layer.
    """

    parameters: int
    macs: int
    weight_bytes: int
    layers: list[LayerStats]

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache per token, over all layers."""
        return sum(layer.kv_cache_bytes for layer in self.layers)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of ``model``; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_stats(config: PreTrainedConfig, seq_len: int = 64, dtype: torch.dtype | None = None) -> ModelStats:
    """Sizes of the model that ``config`` describes, without its weights.

    Args:
        config: configuration of a supported family.
        seq_len: MACs are counted for a forward on (1, ``seq_len``) tokens.
        dtype: dtype of weights and cache (default: that of the configuration, else fp32).

    Raises:
        UserError: for an unsupported family.
    """
    family = find_family(config)
    config = copy.deepcopy(config)
    # Eager attention and batched experts (each token with the experts it is routed to) consist of matrix products,
    # which the FLOP counter supports on every device.
    model = model_on_meta(
        config,
        attn_implementation="eager",
        experts_implementation="batched_mm",
        dtype=dtype or config.dtype or torch.float32,
    )
    counter = _count_forward(model, seq_len)
    macs = {module: sum(operations.values()) // 2 for module, operations in counter.get_flop_counts().items()}
    layers = [
        LayerStats(
            shape=shape,
            parameters=count_parameters(layer),
            macs=macs[f"{type(model).__name__}.{family.layers}.{index}"],
            kv_cache_bytes=shape.cached_values * model.dtype.itemsize,
        )
        for index, (layer, shape) in enumerate(zip(family.decoder_layers(model), layer_shapes(config), strict=True))
    ]
    return ModelStats(
        parameters=count_parameters(model),
        macs=counter.get_total_flops() // 2,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        layers=layers,
    )


@torch.no_grad()
def _count_forward(model: PreTrainedModel, seq_len: int) -> FlopCounterMode:
    """Torch's FLOP counter after a forward on (1, ``seq_len``) tokens; attention counts all ``seq_len``² pairs."""
    with torch.device("meta"):
        tokens = torch.zeros(1, seq_len, dtype=torch.long)
        # A 4-D mask is used as is; building one would read values, which meta tensors do not have. ALiBi is computed
        # from a 2-D one.
        positions = torch.arange(seq_len)[None]
        mask = torch.zeros(1, 1, seq_len, seq_len, dtype=model.dtype)
        if find_family(model.config).has_head_biases(model.config):
            mask = torch.ones(1, seq_len, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return counter


def removed_share(layers: nn.ModuleList, family: Family, masks: list[LayerMask]) -> float:
    """Share of the block weights (attention and MLP matrices of all layers) that ``masks`` remove.

    Args:
        layers: decoder layers in their shapes before removal.
        family: family of the model.
        masks: one mask per layer.
    """
    sizes = [weights_of(layer, family, mask) for layer, mask in zip(layers, masks, strict=True)]
    return sum(removed for removed, _ in sizes) / sum(total for _, total in sizes)


def weights_of(layer: nn.Module, family: Family, mask: LayerMask) -> tuple[int, int]:
    """Number of block weights of ``layer`` that ``mask`` removes, and of all its block weights, without the router."""
    vectors = {name for name, _ in (*family.head_parameters, *router_tensors(family))}
    parameters = {name: weight for name, weight in layer.named_parameters() if name not in vectors}
    total = removed = 0
    for name, (dim, kept) in kept_indices(family, mask).items():
        if name in parameters and not name.endswith("bias"):
            weight = parameters[name]
            total += weight.numel()
            removed += weight.numel() - count_weights(weight, dim, kept)
    return removed, total
