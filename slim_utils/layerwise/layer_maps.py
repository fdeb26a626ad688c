"""The output maps of a layer, of its heads and of its columns, with the Hessians of the calibration samples."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from slim_utils.families import Family, LayerShape, linear_map
from slim_utils.layerwise.distributed import SINGLE_PROCESS, ProcessGroup
from slim_utils.layerwise.experts import Experts, expert_maps
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.output_maps import OutputMaps, UnitMap
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.slimgpt import SlimGPT


def column_parameters(layer: nn.Module, family: Family, shape: LayerShape) -> list[Tensor]:
    """Return the weights of the output maps that lose columns: of the FFN, or of the experts and the shared expert."""
    if not shape.num_experts:
        return [linear_map(layer, family.mlp_out).weight.data]
    experts = layer.get_submodule(family.experts).get_parameter("down_proj").data
    return [experts, *([linear_map(layer, family.shared_map).weight.data] if shape.shared_per_column else [])]


def head_maps(
    index: int,
    forwards: list[LayerForward],
    shape: LayerShape,
    settings: PruningSettings,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> OutputMaps:
    """Return the attention's output map of layer ``index``, before :meth:`LayerForward.finish_attention`."""
    layer, name = forwards[0].layer, forwards[0].family.attention_out
    linear, by_query_head = linear_map(layer, name), settings.by_query_head(shape)
    inputs = chain.from_iterable(forward.attention_inputs() for forward in forwards)
    pruner = _accumulated(linear, f"layer {index} {name}", inputs, processes)
    return OutputMaps(
        name,
        [UnitMap(pruner)],
        [linear.weight.data],
        unit_size=shape.head_dim * (1 if by_query_head else shape.heads_per_group),
        num_groups=shape.head_groups if by_query_head else 1,
    )


def column_maps(
    index: int, forwards: list[LayerForward], shape: LayerShape, processes: ProcessGroup = SINGLE_PROCESS
) -> OutputMaps:
    """Return the maps of :func:`column_parameters` of layer ``index``, after :meth:`LayerForward.finish_attention`."""
    layer, family = forwards[0].layer, forwards[0].family
    parameters = column_parameters(layer, family, shape)
    if not shape.num_experts:
        name, linear = family.mlp_out, linear_map(layer, family.mlp_out)
        inputs = chain.from_iterable(forward.column_inputs() for forward in forwards)
        return OutputMaps(name, [UnitMap(_accumulated(linear, f"layer {index} {name}", inputs, processes))], parameters)
    calls = chain.from_iterable(forward.expert_calls() for forward in forwards)
    maps = expert_maps(Experts.of(layer, family), f"layer {index} {family.experts}", calls, processes)
    if shape.shared_per_column:
        inputs = chain.from_iterable(forward.shared_inputs() for forward in forwards)
        name = f"layer {index} {family.shared_expert}"
        shared = _accumulated(linear_map(layer, family.shared_map), name, inputs, processes)
        maps.append(UnitMap(shared, per_unit=shape.shared_per_column))
    return OutputMaps(family.experts, maps, parameters)


def _accumulated(linear: nn.Linear, name: str, inputs: Iterable[Tensor], processes: ProcessGroup) -> SlimGPT:
    """``linear`` with the Hessian of ``inputs`` over all processes."""
    pruner = SlimGPT(linear, name)
    for batch in inputs:
        pruner.add_batch(batch)
    pruner.all_reduce_hessian(processes.all_reduce)
    return pruner
