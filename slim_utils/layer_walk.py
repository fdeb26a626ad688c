"""The layer walk: one decoder layer after another, each on the outputs of the pruned ones before it.

The walk knows no family: it asks the table's row for the names of two linear maps, and replays a layer with exactly the
arguments that the model itself called it with.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from slim_utils.errors import UserError
from slim_utils.experts import prune_experts
from slim_utils.families import Family, LayerShape, layer_shapes
from slim_utils.model_io import peak_memory_mib
from slim_utils.params_remove import settle_heads
from slim_utils.pruning_record import LayerMask
from slim_utils.slimgpt import PruneResult, SlimGPT, units_to_remove
from slim_utils.sparsity_schedule import aligned_ratios

logger = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 8192
GQA_UNITS = ("query_head", "kv_group")


@dataclass(frozen=True)
class WalkSettings:
    """How to walk.

    Attributes:
        device: where layers are run and pruned; a layer is moved there and back.
        cache_dev: where the activations between layers are kept.
        batch_samples: samples brought from ``cache_dev`` to ``device`` at once.
        percdamp: damping, as a share of the mean of the Hessian's diagonal.
        compensate: whether the remaining weights are updated.
        gqa_unit: what goes where query heads share key/value heads, one of ``GQA_UNITS``: equally many query heads of
            every group, whose key/value head stays, or whole kv groups.
        heads_multiple: every layer keeps a multiple of so many heads, or kv groups where those are the unit.
        columns_multiple: every layer keeps a multiple of so many FFN columns.
        alike: layers of one ratio keep equally many, whatever the multiples leave over.
    """

    device: torch.device
    cache_dev: torch.device
    batch_samples: int = 128
    percdamp: float = 0.01
    compensate: bool = True
    gqa_unit: str = "query_head"
    heads_multiple: int = 1
    columns_multiple: int = 1
    alike: bool = False

    def by_query_head(self, shape: LayerShape) -> bool:
        """Whether the unit of a layer of ``shape`` is a query head of a group."""
        return self.gqa_unit == "query_head" and shape.heads_per_group > 1

    def aligned(self, shapes: list[LayerShape], ratios: list[float]) -> list[tuple[float, float]]:
        """Ratios of the heads (or kv groups) and of the FFN columns of every layer that keep the multiples asked."""
        units, multiples = [], []
        for shape in shapes:
            groups, multiple = shape.num_kv_heads, self.heads_multiple
            by_head = self.by_query_head(shape)
            units.append(shape.heads_per_group if by_head else groups)
            multiples.append(multiple // math.gcd(multiple, groups) if by_head else multiple)
        heads = aligned_ratios(ratios, units, multiples, self.alike)
        columns = [shape.ffn_width for shape in shapes]
        columns = aligned_ratios(ratios, columns, [self.columns_multiple] * len(shapes), self.alike)
        return list(zip(heads, columns, strict=True))


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer: the ratio asked, the result of each linear map, seconds and peak memory (MiB)."""

    layer: int
    ratio: float
    mask: LayerMask
    attention: PruneResult
    mlp: PruneResult
    seconds: float
    peak_memory_mib: dict[str, float]


# Positional and keyword arguments, besides the hidden states, that the model calls a layer with, by batch size.
LayerCalls = dict[int, tuple[tuple, dict[str, Any]]]


@dataclass(frozen=True)
class LayerInputs:
    """What one layer is run on.

    Attributes:
        hidden: (num_samples, seqlen, hidden) its inputs, on ``settings.cache_dev``.
        calls: its other arguments, on ``settings.device``.
        settings: how to walk.
    """

    hidden: Tensor
    calls: LayerCalls
    settings: WalkSettings

    def run(self, layer: nn.Module, batch: Tensor) -> Tensor:
        """Output (samples, seqlen, hidden) of ``layer`` on a batch of its inputs, called as the model does."""
        args, kwargs = self.calls[batch.shape[0]]
        output = layer(batch, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def inputs_of(self, module: nn.Module, layer: nn.Module) -> Iterator[tuple[Tensor, ...]]:
        """Arguments of a ``module`` inside ``layer``, batch by batch; the layer runs no further than that."""
        seen: list[tuple[Tensor, ...]] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args)
            raise _InputSeen

        handle = module.register_forward_pre_hook(stop)
        try:
            for batch in _batches(self.hidden, self.settings):
                with suppress(_InputSeen):
                    self.run(layer, batch)
                yield seen.pop()
        finally:
            handle.remove()

    def advance(self, layer: nn.Module) -> None:
        """Replace the cached inputs of ``layer`` by its outputs."""
        for chunk in self.hidden.split(self.settings.batch_samples):
            batches = chunk.to(self.settings.device).split(_samples_per_forward(chunk))
            chunk.copy_(torch.cat([self.run(layer, batch) for batch in batches]))


class _InputSeen(Exception):  # noqa: N818 - not an error
    """Raised to stop a layer once the input of the module of interest was seen."""


@torch.no_grad()
def prune_layers(
    model: PreTrainedModel, family: Family, samples: Tensor, ratios: list[float], settings: WalkSettings
) -> tuple[list[LayerMask], list[LayerReport]]:
    """Prune ``model`` in place, layer by layer.

    Args:
        model: on the CPU; its weights are changed, its shapes are not.
        family: its row of the table.
        samples: (num_samples, seqlen) calibration token ids.
        ratios: pruning ratio of every layer; 0 leaves a layer alone.
        settings: how.

    Returns:
        The mask of every layer of the model, and a report of every pruned one.

    Raises:
        UserError: if activations are not finite, with the layer named.
    """
    shapes = layer_shapes(model.config)
    masks = [LayerMask.dense(shape) for shape in shapes]
    reports: list[LayerReport] = []
    pruned = [index for index, ratio in enumerate(ratios) if ratio > 0]
    if not pruned:
        return masks, reports
    aligned = settings.aligned(shapes, ratios)
    layers = family.decoder_layers(model)
    hidden, calls = capture_layer_calls(model, layers, samples, settings)
    with logging_redirect_tqdm():
        for index in tqdm(range(pruned[-1] + 1), desc="layers", unit="layer", disable=None):
            layer = layers[index].to(settings.device)
            inputs = LayerInputs(hidden, send_to_device(calls[index], settings.device), settings)
            if ratios[index] > 0:
                report = _prune_layer(index, layer, family, shapes[index], ratios[index], aligned[index], inputs)
                masks[index] = report.mask
                reports.append(report)
                _log_report(report, len(layers))
            if index < pruned[-1]:
                inputs.advance(layer)
                _check_finite(hidden, f"layer {index}")
            layer.to("cpu")
    return masks, reports


def planned_masks(shapes: list[LayerShape], ratios: list[float], settings: WalkSettings) -> list[LayerMask]:
    """Masks of the sizes that pruning will give; which units they keep is not known before."""
    masks = []
    for shape, (head_ratio, column_ratio) in zip(shapes, settings.aligned(shapes, ratios), strict=True):
        width = shape.ffn_width - units_to_remove(shape.ffn_width, column_ratio)
        columns = [ffn * shape.ffn_width + i for ffn in range(shape.num_ffns) for i in range(width)]
        groups, size = shape.num_kv_heads, shape.heads_per_group
        if settings.by_query_head(shape):
            kept = size - units_to_remove(shape.num_heads, head_ratio, groups) // groups
            heads = [group * size + i for group in range(groups) for i in range(kept)]
            masks.append(LayerMask.from_heads(shape, heads, columns))
        else:
            masks.append(
                LayerMask.from_groups(shape, list(range(groups - units_to_remove(groups, head_ratio))), columns)
            )
    return masks


def _prune_layer(
    index: int,
    layer: nn.Module,
    family: Family,
    shape: LayerShape,
    ratio: float,
    aligned: tuple[float, float],
    inputs: LayerInputs,
) -> LayerReport:
    """Prune the heads of a layer, then, on what its pruned attention puts out, its FFN columns."""
    settings, start = inputs.settings, time.perf_counter()

    def prune(name: str, ratio: float, unit_size: int, num_groups: int = 1) -> PruneResult:
        linear = layer.get_submodule(name)
        pruner = SlimGPT(linear, f"layer {index} {name}")
        for (batch,) in inputs.inputs_of(linear, layer):
            pruner.add_batch(batch)
        result = pruner.struct_prune(ratio, unit_size, settings.percdamp, settings.compensate, num_groups)
        pruner.free()
        return result

    if settings.by_query_head(shape):
        attention = prune(family.attention_out, aligned[0], shape.head_dim, shape.num_kv_heads)
        keep = LayerMask.from_heads
    else:
        attention = prune(family.attention_out, aligned[0], shape.head_dim * shape.heads_per_group)
        keep = LayerMask.from_groups
    settle_heads(layer, family, keep(shape, attention.kept_units, list(range(shape.num_columns))))
    if shape.num_experts:
        experts = layer.get_submodule(family.experts)
        calls = inputs.inputs_of(experts, layer)
        name = f"layer {index} {family.experts}"
        mlp = prune_experts(experts, name, calls, aligned[1], settings.percdamp, settings.compensate)
    else:
        mlp = prune(family.mlp_out, aligned[1], 1)
    mask = keep(shape, attention.kept_units, mlp.kept_units)
    seconds = time.perf_counter() - start
    return LayerReport(index, ratio, mask, attention, mlp, seconds, peak_memory_mib(settings.device))


def capture_layer_calls(
    model: PreTrainedModel, layers: nn.ModuleList, samples: Tensor, settings: WalkSettings
) -> tuple[Tensor, list[LayerCalls]]:
    """Run the model with its layers passed over, and record what each would have been called with.

    Windows have one length and no padding, so calls differ between batches by nothing but the batch size.

    Returns:
        The first layer's inputs (num_samples, seqlen, hidden) on ``cache_dev``, and the calls of every layer.
    """
    first_inputs: list[Tensor] = []
    with _layers_passed_over(layers, first_inputs) as calls:
        for batch in _batches(samples, settings):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    hidden = torch.cat([batch.to(settings.cache_dev) for batch in first_inputs])
    _check_finite(hidden, "the embeddings")
    return hidden, calls


@contextmanager
def _layers_passed_over(layers: nn.ModuleList, first_inputs: list[Tensor]) -> Iterator[list[LayerCalls]]:
    calls: list[LayerCalls] = [{} for _ in layers]

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                first_inputs.append(hidden)
            calls[index][hidden.shape[0]] = (args[1:], kwargs)
            return hidden

        return forward

    for index, layer in enumerate(layers):
        layer.forward = recorder(index)
    try:
        yield calls
    finally:
        for layer in layers:
            # Removes the recorder from the instance; the class's own method shows again.
            del layer.forward


def _batches(samples: Tensor, settings: WalkSettings) -> Iterator[Tensor]:
    """``samples`` (num_samples, seqlen, …) in batches on the device, the same ones each time."""
    for chunk in samples.split(settings.batch_samples):
        yield from chunk.to(settings.device).split(_samples_per_forward(samples))


def _samples_per_forward(samples: Tensor) -> int:
    return max(1, TOKENS_PER_FORWARD // samples.shape[1])


def _check_finite(hidden: Tensor, where: str) -> None:
    if not all(torch.isfinite(sample).all() for sample in hidden):
        raise UserError(f"{where}: non-finite activations; try --dtype bfloat16 or float32")


def _log_report(report: LayerReport, num_layers: int) -> None:
    shape = report.mask.shape
    peaks = ", ".join(f"{name} {mib / 1024:.2f} GiB" for name, mib in report.peak_memory_mib.items())
    logger.info(
        "layer %d/%d ratio %.4f: heads −%d/%d error %.2e → %.2e, columns −%d/%d error %.2e → %.2e, %.1f s, peak %s",
        report.layer,
        num_layers,
        report.ratio,
        shape.num_heads - len(report.mask.kept_heads),
        shape.num_heads,
        report.attention.error_zeroed,
        report.attention.error,
        shape.num_columns - len(report.mask.kept_columns),
        shape.num_columns,
        report.mlp.error_zeroed,
        report.mlp.error,
        report.seconds,
        peaks,
    )
