"""Removal of pruned units: a masked model in the original shapes, or a pruned model with per-layer shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.family import ExpertLayout
from slim_utils.common.loading import model_on_meta
from slim_utils.families import (
    BLOCKED_QVK,
    COLUMNS,
    GATED_HEADS,
    GROUPED_QKV,
    HEADS,
    KV_HEADS,
    LATENT_KEY_VALUES,
    LATENT_QUERIES,
    QKV,
    SHARED_COLUMNS,
    Family,
    LayerShape,
    layer_shapes,
)
from slim_utils.masks import LayerMask, columns_by_ffn
from slim_utils.pruned_config import slim_config, stock_config
from slim_utils.routers import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Indices of slices of a parameter; of 3-D experts, a tensor per expert.
Indices = Tensor | list[Tensor]


def expand(units: list[int], size: int) -> Tensor:
    """Return the indices of the rows or columns of ``units``, each ``size`` wide."""
    return (torch.tensor(units, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def kept_indices(family: Family, mask: LayerMask) -> dict[str, tuple[int, Indices]]:
    """Return the dimension and kept indices of every prunable parameter of a layer, by name.

    Linear maps lose rows (dimension 0, or 1 where weights are stored transposed), together with the entries of their
    biases, or columns (1, or 0). The 3-D parameters of experts lose rows (1) or columns (2) of each expert, or the
    other way round, and their biases the entries; these indices are one tensor per expert, empty for an expert that is
    removed as a whole. Tensors with an entry per expert, those of the router and biases of outputs, lose the entries of
    such an expert.
    """
    return _indices(family, mask.shape, mask.kept_units(), mask.kept_experts)


def removed_indices(family: Family, mask: LayerMask) -> dict[str, tuple[int, Indices]]:
    """Return the dimension and removed indices of every prunable parameter, as :func:`kept_indices`."""
    removed_experts = sorted(set(range(mask.shape.num_experts)) - set(mask.kept_experts))
    return _indices(family, mask.shape, mask.removed_units(), removed_experts)


def _indices(
    family: Family, shape: LayerShape, units: dict[str, list[int]], experts: list[int]
) -> dict[str, tuple[int, Indices]]:
    """Return the dimension and the indices of ``units`` of every prunable parameter of a layer of ``shape``."""
    kept = _rows_by_kind(shape, units)
    rows_dim, columns_dim = family.stored_dim(0), family.stored_dim(1)
    parameters: dict[str, tuple[int, Indices]] = {f"{family.attention_out}.weight": (columns_dim, kept[HEADS][0])}
    rows = family.attention_rows
    if shape.num_experts:
        columns = [torch.tensor(row, dtype=torch.long) for row in columns_by_ffn(shape, units[COLUMNS])]
        layout, entries = family.expert_layout, torch.tensor(experts, dtype=torch.long)
        gate_up = [_gate_up_rows(row, shape.ffn_width, layout) for row in columns]
        parameters[f"{family.experts}.down_proj"] = (1 if layout.transposed else 2, columns)
        parameters[f"{family.experts}.down_proj_bias"] = (0, entries)
        parameters[f"{family.experts}.{layout.columns_in}"] = (2 if layout.transposed else 1, gate_up)
        parameters[f"{family.experts}.{layout.columns_in}_bias"] = (1, gate_up)
        parameters |= {name: (dim, entries) for name, dim in router_tensors(family)}
        if shape.num_shared_columns:
            parameters[f"{family.shared_map}.weight"] = (columns_dim, kept[SHARED_COLUMNS][0])
            rows += tuple((f"{family.shared_expert}.{name}", kinds) for name, kinds in family.shared_rows)
    else:
        parameters[f"{family.mlp_out}.weight"] = (columns_dim, kept[COLUMNS][0])
        rows += family.mlp_rows

    def stacked(kinds: tuple[str, ...]) -> Tensor:
        parts, offset = [], 0
        for kind in kinds:
            indices, size = kept[kind]
            parts.append(indices + offset)
            offset += size
        return torch.cat(parts)

    for name, kinds in rows:
        indices = stacked(kinds)
        parameters |= {f"{name}.weight": (rows_dim, indices), f"{name}.bias": (0, indices)}
    for name, kind in family.head_parameters:
        parameters[name] = (0, expand(units[kind], 1))
    return parameters


def _gate_up_rows(columns: Tensor, width: int, layout: ExpertLayout) -> Tensor:
    """Return the indices of the gates, if any, and the ups of ``columns`` of an expert of ``width`` columns."""
    if not layout.gated:
        return columns
    return expand(columns.tolist(), 2) if layout.interleaved else torch.cat([columns, columns + width])


def router_tensors(family: Family) -> list[tuple[str, int]]:
    """Return the names in a layer of the router's tensors with an entry per expert, and the dimension of these."""
    return [(f"{family.router}.{name}", dim) for name, dim in family.router_tensors]


def select_indices(tensor: Tensor, dim: int, indices: Indices) -> Tensor:
    """Return the slices ``indices`` of ``tensor`` along ``dim``.

    Of a list of indices per expert, those with fewer than the longest belong to experts that are left out.
    """
    if isinstance(indices, Tensor):
        return tensor.index_select(dim, indices.to(tensor.device))
    longest = max(map(len, indices))
    experts = [(expert, row) for expert, row in zip(tensor, indices, strict=True) if len(row) == longest]
    return torch.stack([expert.index_select(dim - 1, row.to(tensor.device)) for expert, row in experts])


def zero_indices(tensor: Tensor, dim: int, indices: Indices) -> Tensor:
    """Zero in place the slices ``indices`` of ``tensor`` along ``dim``, by expert if they are a list."""
    if isinstance(indices, Tensor):
        return tensor.index_fill_(dim, indices.to(tensor.device), 0)
    for expert, row in zip(tensor, indices, strict=True):
        expert.index_fill_(dim - 1, row.to(tensor.device), 0)
    return tensor


def num_indices(indices: Indices) -> int:
    """Return the number of indices, of all experts together if they are a list."""
    return len(indices) if isinstance(indices, Tensor) else sum(map(len, indices))


def count_weights(tensor: Tensor, dim: int, indices: Indices) -> int:
    """Return the number of weights in the slices ``indices`` of ``tensor`` along ``dim``."""
    sliced = tensor if isinstance(indices, Tensor) else tensor[0]
    return sliced.numel() // tensor.shape[dim] * num_indices(indices)


def _rows_by_kind(shape: LayerShape, units: dict[str, list[int]]) -> dict[str, tuple[Tensor, int]]:
    """Return the indices of the rows of ``units``, and the number of all rows, of each kind."""
    # Units, their number in the layer, and the rows of each.
    kinds = {
        HEADS: (units[HEADS], shape.num_heads, shape.head_dim),
        KV_HEADS: (units[KV_HEADS], shape.num_kv_heads, shape.head_dim),
        QKV: (units[HEADS], shape.num_heads, 3 * shape.head_dim),
        GROUPED_QKV: (_grouped_qkv(shape, units), shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim),
        BLOCKED_QVK: (_blocked_qvk(shape, units[HEADS]), 3 * shape.num_heads, shape.head_dim),
        GATED_HEADS: (units[HEADS], shape.num_heads, 2 * shape.head_dim),
        LATENT_QUERIES: (units[HEADS], shape.num_heads, shape.query_dim),
        LATENT_KEY_VALUES: (units[HEADS], shape.num_heads, shape.query_dim - shape.rotated_dim + shape.head_dim),
        COLUMNS: (units[COLUMNS], shape.num_columns, 1),
        SHARED_COLUMNS: (units.get(SHARED_COLUMNS, []), shape.num_shared_columns, 1),
    }
    return {kind: (expand(rows, size), total * size) for kind, (rows, total, size) in kinds.items()}


def _grouped_qkv(shape: LayerShape, units: dict[str, list[int]]) -> list[int]:
    """Return the positions of heads and kv heads in a map that has, group by group, the queries, a key and a value."""
    size = shape.heads_per_group
    queries = [head // size * (size + 2) + head % size for head in units[HEADS]]
    keys_values = [group * (size + 2) + size + i for group in units[KV_HEADS] for i in range(2)]
    return sorted(queries + keys_values)


def _blocked_qvk(shape: LayerShape, heads: list[int]) -> list[int]:
    """Return the positions of heads in a map that has, block by block, the queries, the values and the keys."""
    size = shape.num_heads // shape.head_blocks
    return sorted(head // size * 3 * size + part * size + head % size for head in heads for part in range(3))


@torch.no_grad()
def zero_removed(model: PreTrainedModel, family: Family, masks: list[LayerMask]) -> None:
    """Zero the removed columns, and the rows and biases that feed them, in place; the logits do not change.

    Routers are masked, see :func:`mask_experts`: they choose among the kept experts.
    """
    for layer, mask in zip(family.decoder_layers(model), masks, strict=True):
        zero_layer(layer, family, mask)


@torch.no_grad()
def zero_layer(layer: nn.Module, family: Family, mask: LayerMask) -> None:
    """Zero the removed units of one layer in place, see :func:`zero_removed`."""
    mask_experts(layer, family, mask)
    parameters = dict(layer.named_parameters())
    for name, (dim, indices) in removed_indices(family, mask).items():
        if name in parameters:
            zero_indices(parameters[name], dim, indices)


def mask_experts(layer: nn.Module, family: Family, mask: LayerMask) -> None:
    """Make the layer's router choose among the experts that ``mask`` keeps.

    No weights of a router express this, so that a saved masked model would choose removed experts again.
    """
    if mask.shape.num_experts:
        Router.of(layer, family).mask(mask.kept_experts)


@torch.no_grad()
def zero_heads(layer: nn.Module, family: Family, mask: LayerMask) -> None:
    """Zero the removed heads and rescale the q/k norms, in families whose q/k norms run over all heads; call it once.

    The mean square of these norms includes the zeros; their weights are rescaled to the mean square of the kept heads
    alone, which the pruned model computes. In other families the rows of a removed head reach no kept head.
    """
    if not (family.head_norms and mask.shape.num_heads):
        return
    zero_layer(layer, family, mask)
    kept = _rows_by_kind(mask.shape, mask.kept_units())
    for name, kind in family.head_norms:
        indices, total = kept[kind]
        layer.get_parameter(f"{name}.weight").mul_(math.sqrt(len(indices) / total))


@torch.no_grad()
def shrink_layer(layer: nn.Module, family: Family, mask: LayerMask) -> dict[str, Tensor]:
    """Return the kept part of the parameters of ``layer`` by name; unpruned parameters are shared, not copied."""
    state = layer.state_dict()
    for name, (dim, kept) in kept_indices(family, mask).items():
        if name in state:
            state[name] = select_indices(state[name], dim, kept)
    for norm, kind in family.head_norms if mask.shape.num_heads else ():
        indices, total = _rows_by_kind(mask.shape, mask.kept_units())[kind]
        name = f"{norm}.weight"
        # The mean square of the pruned model is over fewer heads.
        state[name] = select_indices(state[name], 0, indices) * math.sqrt(total / len(indices))
    return state


def pruned_on_meta(
    model: PreTrainedModel, family: Family, masks: list[LayerMask], uniform_shapes: bool = False
) -> PreTrainedModel:
    """Return the pruned model without weights, on the meta device.

    Of ``masks`` the sizes matter and, where heads have biases of their own, which heads they keep.

    Raises:
        UserError: if ``uniform_shapes`` is set and a stock class does not allow the shapes.
    """
    config = (stock_config if uniform_shapes else slim_config)(model.config, family, masks)
    pruned = model_on_meta(
        config,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        experts_implementation=model.config._experts_implementation,
    )
    pruned.generation_config = model.generation_config
    return pruned


@torch.no_grad()
def shrink(
    model: PreTrainedModel, family: Family, masks: list[LayerMask], uniform_shapes: bool = False
) -> PreTrainedModel:
    """Return the pruned model: the units of ``model`` that ``masks`` keep, in its dtype.

    Unpruned parameters (embeddings, norms) are shared with ``model``, not copied.

    Args:
        model: masked model, or the model before its removed units are zeroed.
        family: row of the table of families.
        masks: mask of every layer.
        uniform_shapes: use the stock class of transformers; the layers are uniform.

    Raises:
        ValueError: if the shapes of ``masks`` are not the model's.
        UserError: if ``uniform_shapes`` is set and a stock class does not allow the shapes.
    """
    if [mask.shape for mask in masks] != layer_shapes(model.config):
        raise ValueError("the layer shapes of the masks differ from the model's")
    state = model.state_dict()
    for index, (layer, mask) in enumerate(zip(family.decoder_layers(model), masks, strict=True)):
        for name, tensor in shrink_layer(layer, family, mask).items():
            state[f"{family.layers}.{index}.{name}"] = tensor
    pruned = pruned_on_meta(model, family, masks, uniform_shapes)
    pruned.load_state_dict(state, assign=True)
    _share_buffers(pruned, model)
    pruned.tie_weights()
    return pruned


def _share_buffers(pruned: PreTrainedModel, model: PreTrainedModel) -> None:
    """Share what the state dict of ``model`` does not carry: modules of buffers alone (rotary embeddings), buffers."""
    for name, module in list(pruned.named_modules()):
        own = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if own and next(module.parameters(), None) is None:
            pruned.set_submodule(name, model.get_submodule(name))
            continue
        for key in own:
            setattr(module, key, model.get_submodule(name).get_buffer(key))
