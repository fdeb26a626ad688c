"""A LoRA adapter of the dense model carried over to the pruned model, without the rows and columns of removed units."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from slim_utils.common.errors import UserError
from slim_utils.families import FAMILIES, Family
from slim_utils.masks import LayerMask, ModelUnits
from slim_utils.params_remove import kept_indices

# Fields of an adapter's configuration that change what its tensors are.
UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes depend on the removed weights",
    "target_parameters": "adapters on parameters of experts are not supported",
}


@dataclass(frozen=True)
class _Factor:
    """A factor of an adapter of a linear map in a decoder layer, or the trained bias of the map.

    Attributes:
        layer: index of the layer.
        parameter: weight or bias of the map, relative to the layer.
        dim: dimension of that weight or bias which is a dimension of the factor, too: 0 for rows, 1 for columns.
    """

    layer: int
    parameter: str
    dim: int


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


def pruned_adapter(tensors: Mapping[str, Tensor], units: ModelUnits) -> dict[str, Tensor]:
    """The tensors of an adapter of the pruned model.

    Of a map that loses rows, ``lora_B`` (out, r) and the bias lose them; of one that loses columns, ``lora_A`` (r, in)
    does. All other tensors stay.

    Args:
        tensors: tensors of an adapter of the dense model, by name.
        units: units of the dense model that the pruned model has.

    Raises:
        UserError: if a tensor has another shape than the dense model's.
    """
    family = FAMILIES[units.model_type]
    pattern = _factor_pattern(family)

    @cache
    def indices(layer: int) -> tuple[dict[str, tuple[int, Tensor]], dict[str, tuple[int, Tensor]]]:
        mask = units.layers[layer]
        return kept_indices(family, mask), kept_indices(family, LayerMask.dense(mask.shape))

    def carried() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            factor = _factor(pattern, name)
            if factor is None:
                yield name, tensor
                continue
            if factor.layer >= len(units.layers):
                raise UserError(f"ADAPTER: {name}: the pruned model has {len(units.layers)} layers")
            kept, dense = (by_name.get(factor.parameter) for by_name in indices(factor.layer))
            if kept is None or dense is None or kept[0] != factor.dim:
                yield name, tensor
                continue
            # The factor of the columns is (r, in), that of the rows (out, r).
            if tensor.shape[factor.dim] != len(dense[1]):
                raise UserError(
                    f"ADAPTER: {name} has {tensor.shape[factor.dim]} in dimension {factor.dim}, the dense model "
                    f"{len(dense[1])}; give an adapter of {units.model}"
                )
            yield name, tensor.index_select(factor.dim, kept[1]).contiguous()

    return dict(carried())


def _factor_pattern(family: Family) -> re.Pattern[str]:
    layers = re.escape(family.layers)
    return re.compile(
        rf"(?:.*\.)?{layers}\.(\d+)\.(.+?)\.(?:(lora_A|lora_B)(?:\.[^.]+)?\.weight|(?:base_layer\.)?bias)"
    )


def _factor(pattern: re.Pattern[str], name: str) -> _Factor | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    layer, linear, kind = match.groups()
    return _Factor(int(layer), f"{linear}.{'weight' if kind else 'bias'}", 1 if kind == "lora_A" else 0)
