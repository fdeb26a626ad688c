"""A LoRA adapter of the dense model carried over to the pruned model, without the rows and columns of removed units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from slim_utils.common.errors import UserError
from slim_utils.families import FAMILIES, Family
from slim_utils.masks import LayerMask, ModelUnits
from slim_utils.params_remove import Indices, kept_indices

# Fields of an adapter's configuration that change what its tensors are.
UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes depend on the removed weights",
    "target_parameters": "adapters on parameters of experts are not supported",
    "layer_replication": "replicated layers are not supported",
    "use_qalora": "QA-LoRA is not supported",
    "use_bdlora": "BD-LoRA is not supported",
}
# Initialisations that leave the weights of the base as they are. After others, peft changes the base again on loading.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Part:
    """A tensor of an adapter that belongs to a parameter of a decoder layer.

    Attributes:
        layer: index of the layer.
        parameter: name of the parameter in the layer.
        dim: dimension of the parameter that is a dimension of the tensor, too: 0 for rows, 1 for columns; ``None`` for
            the whole parameter.
    """

    layer: int
    parameter: str
    dim: int | None


def check_adapter(config: Mapping[str, Any]) -> None:
    """Check that an adapter can be carried over.

    Args:
        config: content of ``adapter_config.json``.

    Raises:
        UserError: naming the setting that rules it out.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"ADAPTER: peft_type is {config.get('peft_type')}, only LORA can be carried over")
    for name, reason in UNSUPPORTED.items():
        if config.get(name):
            raise UserError(f"ADAPTER: {name} is {config[name]}: {reason}")
    if config.get("init_lora_weights") not in INITIALISATIONS:
        raise UserError(
            f"ADAPTER: init_lora_weights is {config['init_lora_weights']}, which changes the weights of the base; "
            "convert it to plain LoRA first (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )


def pruned_adapter(tensors: Mapping[str, Tensor], units: ModelUnits) -> dict[str, Tensor]:
    """The tensors of an adapter of the pruned model.

    Of a map that loses rows, ``lora_B`` (out, r) and the bias lose them; of one that loses columns, ``lora_A`` (r, in)
    does. Weights that were trained whole lose either. All other tensors stay.

    Args:
        tensors: tensors of an adapter of the dense model, by name.
        units: units of the dense model that the pruned model has.

    Raises:
        UserError: if a tensor has another shape than the dense model's, or those of layers have names of another model.
    """
    family = FAMILIES[units.model_type]
    pattern = _part_pattern(family)
    of_layers = [name for name in tensors if re.search(r"\.\d+\.", name)]
    if of_layers and not any(_part(pattern, name) for name in of_layers):
        raise UserError(f"ADAPTER: {of_layers[0]} is not in {family.layers}; give an adapter of {units.model}")

    @cache
    def indices(layer: int) -> tuple[dict[str, tuple[int, Indices]], dict[str, tuple[int, Indices]]]:
        if layer >= len(units.layers):
            raise UserError(f"ADAPTER: has a layer {layer}, the pruned model has {len(units.layers)} layers")
        mask = units.layers[layer]
        return kept_indices(family, mask), kept_indices(family, LayerMask.dense(mask.shape))

    def carried(name: str, tensor: Tensor) -> Tensor:
        part = _part(pattern, name)
        if part is None:
            return tensor
        kept, dense = (by_name.get(part.parameter) for by_name in indices(part.layer))
        if kept is None or dense is None:
            return tensor
        dim, total = kept[0] if part.dim is None else family.stored_dim(kept[0]), len(dense[1])
        if part.dim not in (None, dim):
            return tensor
        # Only 3-D parameters, which are refused, have indices per expert.
        assert isinstance(kept[1], Tensor)
        if tensor.shape[dim] != total:
            raise UserError(
                f"ADAPTER: {name} has {tensor.shape[dim]} in dimension {dim}, the dense model {total}; give an adapter "
                f"of {units.model}"
            )
        return tensor.index_select(dim, kept[1]).contiguous()

    return {name: carried(name, tensor) for name, tensor in tensors.items()}


def _part_pattern(family: Family) -> re.Pattern[str]:
    factor = r"(lora_A|lora_B)(?:\.[^.]+)?\."
    wrapper = r"(?:base_layer|modules_to_save(?:\.[^.]+)?)\."
    return re.compile(rf"(?:.*\.)?{re.escape(family.layers)}\.(\d+)\.(.+?)\.(?:{factor}|{wrapper})?(weight|bias)")


def _part(pattern: re.Pattern[str], name: str) -> _Part | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    layer, module, factor, leaf = match.groups()
    if factor is None:
        return _Part(int(layer), f"{module}.{leaf}", None)
    return _Part(int(layer), f"{module}.weight", 1 if factor == "lora_A" else 0)
