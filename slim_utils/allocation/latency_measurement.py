"""Measurement of a latency table on the device at hand.

1. Group the layers into kinds that differ in heads and FFN columns alone; choose numbers of heads and columns for each.
2. Build models with random weights whose layers have these sizes: together they are the points of the table.
3. Run greedy generation with each in turn; hooks take the time of every layer and of its attention.
4. Take medians over layers and repeats, and make them monotone.

A layer is timed inside of a running model, after other layers, so that its weights come from memory as they do in use.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from slim_utils.allocation.alignment import Alignment
from slim_utils.common.environment import command_line, environment
from slim_utils.common.random_model import random_model
from slim_utils.families import Family, LayerShape, find_family, layer_shapes
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.profiling.latency import WARM_UPS, greedy_step, random_prompt
from slim_utils.profiling.latency_table import (
    LatencyCurve,
    LatencyTable,
    LayerLatency,
    PhaseSeconds,
    TimedModel,
    TimedRequest,
)
from slim_utils.pruned_config import slim_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Numbers of units on a curve.
POINTS = 8


def curve_points(total: int, multiple: int = 1) -> list[int]:
    """Return at most ``POINTS`` numbers of units up to ``total``, evenly spaced, ascending.

    All but ``total`` itself are multiples of ``multiple``.
    """
    steps = (math.ceil(total * step / POINTS / multiple) * multiple for step in range(1, POINTS + 1))
    return sorted({min(step, total) for step in steps})


@dataclass
class _Kind:
    """Layers of one kind.

    Attributes:
        shape: shape of the widest of them.
        units: units of heads of that shape.
        layers: their indices.
    """

    shape: LayerShape
    units: int
    layers: list[int] = field(default_factory=list)

    @property
    def heads(self) -> list[int]:
        """Points of the curve of heads."""
        return curve_points(self.units)

    @property
    def columns(self) -> list[int]:
        """Points of the curve of columns."""
        multiple = Alignment.expert_columns_multiple if self.shape.num_experts else 1
        return curve_points(self.shape.ffn_width, multiple)

    def point(self, number: int) -> tuple[int, int]:
        """Return the heads and the columns of the ``number``-th timed layer; numbers go round the points."""
        return self.heads[number % len(self.heads)], self.columns[number % len(self.columns)]

    @property
    def models(self) -> int:
        """Models whose layers of this kind have all points."""
        return math.ceil(max(len(self.heads), len(self.columns)) / len(self.layers))


def layer_kinds(config: PreTrainedConfig, settings: PruningSettings) -> list[_Kind]:
    """Return the kinds of the layers: by attention, experts, and the heads of a unit."""
    shapes = layer_shapes(config)
    attention = getattr(config, "layer_types", None) or [""] * len(shapes)
    kinds: dict[tuple, _Kind] = {}
    for index, (shape, attention_type) in enumerate(zip(shapes, attention, strict=True)):
        by_query_head, per_unit = settings.by_query_head(shape), settings.heads_per_unit(shape)
        key = (attention_type, shape.num_experts, shape.head_dim, by_query_head, per_unit, shape.kv_sharing == "reuse")
        kind = kinds.setdefault(key, _Kind(shape, settings.head_units(shape)))
        if settings.head_units(shape) > kind.units:
            columns = kind.shape.num_columns
            kind.shape, kind.units = replace(shape, num_columns=columns), settings.head_units(shape)
        kind.shape = replace(kind.shape, num_columns=max(kind.shape.num_columns, shape.num_columns))
        kind.layers.append(index)
    return list(kinds.values())


@dataclass(frozen=True)
class _LayerPoint:
    """Heads and columns of a timed layer, and the number of its kind."""

    kind: int
    heads: int
    columns: int


def _point_of_layers(kinds: list[_Kind], model: int) -> dict[int, _LayerPoint]:
    """Return the point of every layer of the ``model``-th model, by index of the layer."""
    points = {}
    for number, kind in enumerate(kinds):
        for position, index in enumerate(kind.layers):
            points[index] = _LayerPoint(number, *kind.point(position + model * len(kind.layers)))
    return points


def _model_of_points(
    config: PreTrainedConfig,
    family: Family,
    kinds: list[_Kind],
    points: dict[int, _LayerPoint],
    settings: PruningSettings,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Return a model on the device, with random weights and layers of the sizes ``points``."""
    masks: list[LayerMask] = []
    for _, point in sorted(points.items()):
        kind = kinds[point.kind]
        removed = (kind.units - point.heads) * settings.heads_per_unit(kind.shape)
        plan = LayerPlan(removed, kind.shape.ffn_width - point.columns)
        masks.append(settings.size_mask(kind.shape, plan))
    return random_model(slim_config(config, family, masks), dtype, settings.device)


class _Clock:
    """Marks of time on a device; on a GPU they are events of its stream, which do not interrupt it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> float | torch.cuda.Event:
        """Return a mark of the present time."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: list) -> list[float]:
        """Return the seconds between neighbouring ``marks``."""
        if self._device.type != "cuda":
            return [end - start for start, end in pairwise(marks)]
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


@dataclass(frozen=True)
class _ForwardSeconds:
    """Seconds of one forward: attention and everything else of every layer, and what is outside of the layers."""

    attention: list[float]
    others: list[float]
    rest: float


class _TimedForwards:
    """Times of the layers of a model, taken by hooks; another mixer of tokens counts to the rest of its layer.

    Args:
        model: on its device.
        family: row of the table of families.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self._model, self._clock = model, _Clock(model.device)
        self._layers = family.decoder_layers(model)
        self._attention = [
            layer.get_submodule(family.attention_block) if shape.num_heads else None
            for layer, shape in zip(self._layers, layer_shapes(model.config), strict=True)
        ]
        self._marks: list = []

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Context in which the forward of the model marks the beginning and end of every layer and attention."""

        def mark(*_: object) -> None:
            self._marks.append(self._clock.mark())

        modules: list[nn.Module] = []
        handles = []
        for layer, attention in zip(self._layers, self._attention, strict=True):
            modules += [layer] if attention is None else [layer, attention]
            # Without attention, which then takes no time, its two marks are at the beginning of the layer.
            handles += [layer.register_forward_pre_hook(mark) for _ in range(2 if attention is None else 0)]
        handles += [module.register_forward_pre_hook(mark) for module in modules]
        handles += [module.register_forward_hook(mark) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def generate(self, request: TimedRequest) -> tuple[_ForwardSeconds, list[_ForwardSeconds]]:
        """Run one greedy generation; return the seconds of the prefill and of every decoding step."""
        tokens, cache, marks = random_prompt(self._model, request.batch_size, request.prompt_tokens), None, []
        with self.hooks():
            for _ in range(1 + request.new_tokens):
                self._marks = [self._clock.mark()]
                tokens, cache = greedy_step(self._model, tokens, cache)
                marks.append([*self._marks, self._clock.mark()])
        prefill, *steps = map(self._forward_seconds, marks)
        return prefill, steps

    def _forward_seconds(self, marks: list) -> _ForwardSeconds:
        """Return the seconds between the marks: start of the forward, four of every layer, end of the forward."""
        spans = self._clock.seconds(marks)
        before, attention, after, between = (spans[start::4] for start in (1, 2, 3, 4))
        others = [first + second for first, second in zip(before, after, strict=True)]
        return _ForwardSeconds(attention, others, spans[0] + sum(between))


class _Samples:
    """Seconds of repeats by part of the model and phase."""

    def __init__(self) -> None:
        self._seconds: dict[object, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))

    def add(self, part: object, prefill: float, steps: list[float]) -> None:
        """Add the seconds of one repeat; of the decoding steps the median."""
        self._seconds[part][0].append(prefill)
        self._seconds[part][1].append(statistics.median(steps))

    def medians(self, part: object) -> PhaseSeconds:
        """Return the medians over all repeats of a part."""
        return PhaseSeconds(*map(statistics.median, self._seconds[part]))


def measure_latency_table(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    request: TimedRequest,
    gqa_unit: str = "query_head",
    repeats: int = 5,
) -> LatencyTable:
    """Return the latency table of the model that ``config`` describes; its weights are not needed.

    The models of the points, each about as large as this one at most, are on the device together.

    Args:
        config: configuration of a supported family.
        dtype: dtype of the weights.
        device: device that is timed.
        request: the batch that is timed.
        gqa_unit: unit of heads in grouped-query attention.
        repeats: timed generations with every model, after ``WARM_UPS`` others.

    Raises:
        UserError: for an unsupported family.
    """
    family, settings = find_family(config), PruningSettings(device, device, gqa_unit=gqa_unit)
    kinds = layer_kinds(config, settings)
    points = [_point_of_layers(kinds, number) for number in range(max(kind.models for kind in kinds))]
    models = [_model_of_points(config, family, kinds, layers, settings, dtype) for layers in points]
    timers, samples = [_TimedForwards(model, family) for model in models], _Samples()
    turns = [number for _ in range(WARM_UPS + repeats) for number in range(len(models))]
    for turn, number in enumerate(tqdm(turns, desc="measuring latency", unit="run", disable=None)):
        prefill, steps = timers[number].generate(request)
        if turn < WARM_UPS * len(models):
            continue
        samples.add("rest", prefill.rest, [step.rest for step in steps])
        for index, point in points[number].items():
            attention, others = [step.attention[index] for step in steps], [step.others[index] for step in steps]
            samples.add((point.kind, "heads", point.heads), prefill.attention[index], attention)
            samples.add((point.kind, "columns", point.columns), prefill.others[index], others)

    def curve(number: int, part: str, kept: list[int]) -> LatencyCurve:
        return LatencyCurve(kept, [samples.medians((number, part, units)) for units in kept]).monotone()

    return LatencyTable(
        model=timed_model(config),
        dtype=str(dtype).removeprefix("torch."),
        device=device_name(device),
        gqa_unit=gqa_unit,
        request=request,
        rest=samples.medians("rest"),
        kinds=[
            LayerLatency(kind.layers, curve(number, "heads", kind.heads), curve(number, "columns", kind.columns))
            for number, kind in enumerate(kinds)
        ],
        versions=environment(device)["versions"],
        command=command_line(),
    )


def timed_model(config: PreTrainedConfig) -> TimedModel:
    """Return what a table says about the model of ``config``."""
    return TimedModel(find_family(config).base_type, config.hidden_size, config.vocab_size, layer_shapes(config))


def device_name(device: torch.device) -> str:
    """Return the name of a device in a table: that of the GPU, or the threads of the CPU."""
    hardware = environment(device)["hardware"]
    if device.type == "cuda":
        return hardware["device"]
    return f"{hardware['machine']} CPU, {hardware['cpu_threads']} threads"
