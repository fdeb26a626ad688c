"""Removing what was pruned: zeros in the original shapes, or a small model whose layers differ in shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig

from slim_utils.common.errors import UserError
from slim_utils.common.loading import model_on_meta
from slim_utils.families import COLUMNS, HEADS, KV_HEADS, Family, layer_shapes
from slim_utils.masks import LayerMask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Written anew for the small model, or meaningless in it.
_DENSE_ONLY_KEYS = ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version")


def expand(units: list[int], size: int) -> Tensor:
    """Indices of the rows or columns of ``units`` that are ``size`` wide."""
    return (torch.tensor(units, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def kept_indices(family: Family, mask: LayerMask) -> dict[str, tuple[int, Tensor]]:
    """For every parameter of a layer that may lose something: its name, the dimension, and the indices that stay.

    Linear maps lose rows (dimension 0), with their biases if there are any, or columns (1); the 3-D parameters of
    experts either of each expert (1 and 2), whose indices are then (experts, kept).
    """
    kept = _kept_by_kind(mask)
    parameters = {f"{family.attention_out}.weight": (1, kept[HEADS][0])}
    rows = family.attention_rows
    if mask.shape.num_experts:
        columns = torch.tensor(mask.columns_by_ffn(), dtype=torch.long).view(mask.shape.num_experts, -1)
        parameters[f"{family.experts}.down_proj"] = (2, columns)
        parameters[f"{family.experts}.gate_up_proj"] = (1, torch.cat([columns, columns + mask.shape.ffn_width], dim=1))
    else:
        parameters[f"{family.mlp_out}.weight"] = (1, kept[COLUMNS][0])
        rows += family.mlp_rows

    def stacked(kinds: tuple[str, ...]) -> Tensor:
        parts, offset = [], 0
        for kind in kinds:
            indices, size = kept[kind]
            parts.append(indices + offset)
            offset += size
        return torch.cat(parts)

    for name, kinds in rows:
        parameters |= dict.fromkeys((f"{name}.weight", f"{name}.bias"), (0, stacked(kinds)))
    return parameters


def select_indices(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The slices ``indices`` of a ``tensor`` along ``dim``; (experts, n) indices are of each expert's own slices."""
    indices = indices.to(tensor.device)
    if indices.dim() == 1:
        return tensor.index_select(dim, indices)
    return torch.stack([part.index_select(dim - 1, own) for part, own in zip(tensor, indices, strict=True)])


def zero_indices(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Zero, in place, what :func:`select_indices` selects."""
    indices = indices.to(tensor.device)
    if indices.dim() == 1:
        return tensor.index_fill_(dim, indices, 0)
    for part, own in zip(tensor, indices, strict=True):
        part.index_fill_(dim - 1, own, 0)
    return tensor


def _kept_by_kind(mask: LayerMask) -> dict[str, tuple[Tensor, int]]:
    """Indices that stay, and how many there were, of rows that are heads, kv heads or columns."""
    shape = mask.shape
    return {
        HEADS: (expand(mask.kept_heads, shape.head_dim), shape.num_heads * shape.head_dim),
        KV_HEADS: (expand(mask.kept_kv_heads, shape.head_dim), shape.num_kv_heads * shape.head_dim),
        COLUMNS: (expand(mask.kept_columns, 1), shape.num_columns),
    }


def removed_indices(family: Family, mask: LayerMask) -> dict[str, tuple[int, Tensor]]:
    """``kept_indices`` of what goes."""
    return kept_indices(family, mask.removed())


@torch.no_grad()
def zero_removed(model: PreTrainedModel, family: Family, masks: list[LayerMask]) -> None:
    """Zero the removed columns and the rows (and their biases) that fed them, in place; the logits do not change."""
    for layer, mask in zip(family.decoder_layers(model), masks, strict=True):
        zero_layer(layer, family, mask)


@torch.no_grad()
def zero_layer(layer: nn.Module, family: Family, mask: LayerMask) -> None:
    """:func:`zero_removed` of one layer."""
    parameters = dict(layer.named_parameters())
    for name, (dim, indices) in removed_indices(family, mask).items():
        if name in parameters:
            zero_indices(parameters[name], dim, indices)


@torch.no_grad()
def zero_heads(layer: nn.Module, family: Family, mask: LayerMask) -> None:
    """Zero what fed the heads that ``mask`` removes, once, where queries and keys are normed over all heads.

    There the zeros count in the mean square of the heads that stay, which is made good in the norm's weight. Elsewhere
    there is nothing to do: what feeds a removed head reaches no other.
    """
    if not family.head_norms:
        return
    zero_layer(layer, family, mask)
    kept = _kept_by_kind(mask)
    for name, kind in family.head_norms:
        indices, total = kept[kind]
        layer.get_parameter(f"{name}.weight").mul_(math.sqrt(len(indices) / total))


def slim_config(config: PreTrainedConfig, family: Family, masks: list[LayerMask]) -> PreTrainedConfig:
    """Configuration of the small model: per-layer shapes, and the lists ``layer_head_num``, ``layer_inter_size``."""
    per_layer = {index: _layer_sizes(config, family, mask) for index, mask in enumerate(masks)}
    # At the top level are the sizes of the model before any pruning, also where it was pruned once already.
    slim = family.slim_config(**_shared_fields(config, masks), per_layer_config=per_layer)
    slim.architectures = [family.slim_model.__name__]
    # save_pretrained adds the other two classes; AutoModel is what vLLM asks for.
    slim.auto_map = {"AutoModel": _auto_model_reference(family)}
    return slim


def stock_config(config: PreTrainedConfig, family: Family, masks: list[LayerMask]) -> PreTrainedConfig:
    """Configuration of the small model in the library's own class, for layers that are all alike.

    A LLaMA whose heads do not divide its hidden size takes the form of a Mistral, which has the same weights.

    Raises:
        UserError: if layers differ, or the library's class refuses their shape.
    """
    sizes: dict[str, int] = {}
    for mask in masks:
        own = _layer_sizes(config, family, mask)
        # Ordinary layers and those of experts have widths of their own.
        if any(sizes.setdefault(key, size) != size for key, size in own.items()):
            raise UserError("--uniform_shapes: layers end in different shapes; use --sparsity on all layers")
    fields = _shared_fields(config, masks) | sizes
    heads, hidden = sizes["num_attention_heads"], config.hidden_size
    try:
        if family.heads_fill_hidden and heads * fields["head_dim"] != hidden:
            raise ValueError("heads have to fill the hidden size")
        return AutoConfig.for_model(family.base_type, **fields)
    except (ValueError, StrictDataclassError) as error:
        has_biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        if family.base_type == "llama" and not has_biases:
            return AutoConfig.for_model("mistral", **fields, sliding_window=None)
        raise UserError(
            f"--uniform_shapes: a {family.base_type} cannot have {heads} heads on a hidden size of {hidden}; choose "
            "another --sparsity, or leave --uniform_shapes out"
        ) from error


def _shared_fields(config: PreTrainedConfig, masks: list[LayerMask]) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _DENSE_ONLY_KEYS}
    fields["head_dim"] = masks[0].shape.head_dim
    fields["layer_head_num"] = [len(mask.kept_heads) for mask in masks]
    fields["layer_inter_size"] = [mask.kept_width for mask in masks]
    return fields


def _layer_sizes(config: PreTrainedConfig, family: Family, mask: LayerMask) -> dict[str, int]:
    width = family.width_key(mask.shape.num_experts)
    sizes = {"num_attention_heads": len(mask.kept_heads), width: mask.kept_width}
    if hasattr(config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = len(mask.kept_kv_heads)
    return sizes


def _auto_model_reference(family: Family) -> str:
    module = family.slim_model.__module__.rsplit(".", 1)[-1]
    return f"{module}.{family.slim_model.__name__.removesuffix('ForCausalLM')}Model"


@torch.no_grad()
def shrink_layer(layer: nn.Module, family: Family, mask: LayerMask) -> dict[str, Tensor]:
    """What ``mask`` keeps of the parameters of ``layer``, by their names in it; those that lose nothing are shared."""
    state = layer.state_dict()
    for name, (dim, kept) in kept_indices(family, mask).items():
        if name in state:
            state[name] = select_indices(state[name], dim, kept)
    for norm, kind in family.head_norms:
        indices, total = _kept_by_kind(mask)[kind]
        name = f"{norm}.weight"
        # The mean square is over fewer heads from here on.
        state[name] = select_indices(state[name], 0, indices) * math.sqrt(total / len(indices))
    return state


def small_on_meta(
    model: PreTrainedModel, family: Family, masks: list[LayerMask], uniform_shapes: bool = False
) -> PreTrainedModel:
    """The small model without weights, on the meta device; which units ``masks`` keep does not matter to it.

    Raises:
        UserError: if ``uniform_shapes`` cannot be.
    """
    config = (stock_config if uniform_shapes else slim_config)(model.config, family, masks)
    small = model_on_meta(
        config,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        experts_implementation=model.config._experts_implementation,
    )
    small.generation_config = model.generation_config
    return small


@torch.no_grad()
def shrink(
    model: PreTrainedModel, family: Family, masks: list[LayerMask], uniform_shapes: bool = False
) -> PreTrainedModel:
    """The small model: only what ``masks`` keep of ``model``, in its dtype.

    The parameters that lose nothing (embeddings, norms) are shared with ``model``, not copied.

    Args:
        model: zeroed or not.
        family: its row of the table.
        masks: a mask a layer.
        uniform_shapes: make it of the library's own class, of layers all alike.

    Raises:
        ValueError: if ``masks`` are not of this model's shape.
        UserError: if ``uniform_shapes`` cannot be.
    """
    if [mask.shape for mask in masks] != layer_shapes(model.config):
        raise ValueError("the masks are of a model of other shapes")
    state = model.state_dict()
    for index, (layer, mask) in enumerate(zip(family.decoder_layers(model), masks, strict=True)):
        for name, tensor in shrink_layer(layer, family, mask).items():
            state[f"{family.layers}.{index}.{name}"] = tensor
    small = small_on_meta(model, family, masks, uniform_shapes)
    small.load_state_dict(state, assign=True)
    _adopt_buffers(small, model)
    small.tie_weights()
    return small


def _adopt_buffers(small: PreTrainedModel, model: PreTrainedModel) -> None:
    """Take the modules that hold only buffers (rotary embeddings) from ``model``: a state dict does not carry them."""
    names = [
        name
        for name, module in small.named_modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]
    for name in names:
        small.set_submodule(name, model.get_submodule(name))
