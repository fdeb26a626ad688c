"""Sensitivity analysis: the loss of the whole model when heads or FFN columns of one layer are removed.

1. Run the dense model layer by layer on the calibration samples.
2. For the heads and for the FFN columns of every layer, compute the OBS error of removing 0, 1, … units.
3. Remove ``REFERENCE_RATIO`` of the units from that map alone and run the rest of the model on a few samples; the
   loss is the KL divergence of its predictions from the dense model's.
4. Scale the errors to that loss: the loss curve of the map.

Under a time limit only some losses are measured; those of the layers between are interpolated.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from slim_utils.allocation.budget import LayerCurves, LayerUnits, LossCurve
from slim_utils.allocation.schedules import units_to_remove
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.errors import UserError
from slim_utils.families import LayerShape, layer_shapes
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs, layer_outputs_given
from slim_utils.layerwise.layer_maps import column_maps, head_maps
from slim_utils.layerwise.less_memory import retry_with_less_memory
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.output_maps import OutputMaps
from slim_utils.layerwise.settings import PruningSettings

logger = logging.getLogger(__name__)

# Ratio at which the loss is measured, and the largest ratio of columns on a curve.
REFERENCE_RATIO, MAX_CURVE_RATIO = 0.3, 0.9
# Steps of a curve of columns, unless a column group is set.
CURVE_STEPS = 64
# Errors below this fraction of the largest count as zero; losses below MIN_LOSS (nats per token) are rounding errors.
REL_TOLERANCE, MIN_LOSS = 1e-6, 1e-6
# Calibration samples for the losses of heads and of columns, and tokens of each sample. Columns are many, so their
# losses vary less between samples.
HEAD_PROBE_SAMPLES, COLUMN_PROBE_SAMPLES, PROBE_TOKENS = 4, 2, 256
# Predictions are compared at every PROBE_STRIDE-th token: on a small model the head costs more than the layers.
PROBE_STRIDE = 4
# Version of the cache file; a file of another version is ignored.
CACHE_FORMAT = 2


class KLProbe:
    """KL divergence of the predictions on a few samples from those of the dense model, after a change of one layer.

    Args:
        host: the whole dense model, with its non-layer modules on the device.
        samples: (count, seqlen) token ids.
        settings: where and in which micro-batches layers run.
    """

    def __init__(self, host: ResidentModel, samples: Tensor, settings: PruningSettings) -> None:
        self._host, self._samples, self._settings = host, samples, settings
        self._positions = torch.arange(PROBE_STRIDE - 1, samples.shape[1], PROBE_STRIDE, device=host.model.device)
        self._hidden, self._calls = capture_layer_kwargs(host.model, host.layers, samples, settings)
        self._dense = list(self._log_probabilities(self._outputs(0)))

    def advance(self, index: int) -> None:
        """Replace the inputs of layer ``index`` by its outputs."""
        self._run(index, self._hidden)

    def divergence(self, index: int) -> float:
        """Return the mean KL divergence in nats per token, with the current weights of layers ``index`` and later.

        Raises:
            UserError: if the predictions are not finite.
        """
        total = 0.0
        for dense, changed in zip(self._dense, self._log_probabilities(self._outputs(index)), strict=True):
            total += functional.kl_div(changed, dense, reduction="sum", log_target=True).item()
        if not math.isfinite(total):
            raise UserError(
                f"layer {index}: predictions are not finite after pruning it; try --dtype bfloat16 or float32"
            )
        return total / (len(self._samples) * len(self._positions))

    def _outputs(self, index: int) -> Tensor:
        hidden = self._hidden.clone()
        for later in range(index, len(self._host.layers)):
            self._run(later, hidden)
            if later > index:
                self._host.offload(later)
        return hidden

    def _run(self, index: int, hidden: Tensor) -> None:
        layer = self._host.onload(index, self._settings.device)
        LayerForward(layer, self._host.family, hidden, self._calls[index], self._settings).advance()

    def _log_probabilities(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield log-probabilities (positions, vocabulary) by sample; all at once may be larger than the model."""
        model = self._host.model
        for sample, output in zip(self._samples, outputs, strict=True):
            given = iter([output[None].to(model.device)])
            with layer_outputs_given(self._host.family, self._host.layers, given):
                logits = model(
                    input_ids=sample[None].to(model.device), use_cache=False, logits_to_keep=self._positions
                ).logits
            yield logits[0].float().log_softmax(-1)


@dataclass
class UnitSensitivity:
    """Sensitivity of the model to removing heads, or FFN columns, of one layer.

    Attributes:
        errors: OBS error with 0, 1, … units removed.
        count: reference count, the units removed for the loss.
        loss: loss with ``count`` units removed, in nats per token; ``None`` if not measured.
    """

    errors: list[float]
    count: int
    loss: float | None = None

    @classmethod
    def without_units(cls) -> "UnitSensitivity":
        """Return the sensitivity to the heads, or the columns, of a layer that has none."""
        return cls([0.0], count=1)

    @property
    def log_text(self) -> str:
        """The loss in a log line."""
        return "not measured" if self.loss is None else f"{self.loss:.4f} nats"

    def loss_curve(self, loss: float) -> np.ndarray:
        """Return the losses with 0, 1, … units removed: the errors, scaled to ``loss`` at ``count`` units."""
        errors = np.array(self.errors)
        return errors * (loss / errors[self.count]) if self.count < len(errors) else errors


@dataclass
class LayerSensitivity:
    """Sensitivity of the model to removing heads and FFN columns of one layer."""

    heads: UnitSensitivity
    columns: UnitSensitivity

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LayerSensitivity":
        """Return the sensitivity of which ``content`` is the ``asdict``."""
        return cls(UnitSensitivity(**content["heads"]), UnitSensitivity(**content["columns"]))


class SensitivityCache:
    """Sensitivities of the layers measured so far, written to a file after each layer, and their time limit.

    Args:
        layers: indices of the layers to measure, ascending.
        num_layers: layers of the model, for log lines.
        protocol: settings that the measurements depend on; a file with another protocol is ignored.
        path: cache file; ``None`` writes none.
        time_limit: seconds for the losses of all layers. The loss of the i-th of n layers is measured if at most i/n of
            the limit has passed since :meth:`start_clock`; the losses of the first and last layer always are.

    Attributes:
        layers: indices of the layers to measure.
        sensitivities: the measured sensitivities by layer.
    """

    def __init__(
        self, layers: Sequence[int], num_layers: int, protocol: list[Any], path: Path | None, time_limit: float
    ) -> None:
        self.layers, self._num_layers = layers, num_layers
        self._header = {"format": CACHE_FORMAT, "protocol": protocol}
        self._path, self._time_limit = path, time_limit
        content = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        matches = all(content.get(key) == value for key, value in self._header.items())
        cached = content["layers"] if matches else {}
        self.sensitivities = {int(index): LayerSensitivity.from_json(layer) for index, layer in cached.items()}

    @property
    def complete(self) -> bool:
        """Whether all layers are measured.

        Losses skipped under the time limit are not measured later: other losses would give other plans than those by
        which layers are already pruned.
        """
        return len(self.sensitivities) == len(self.layers)

    def start_clock(self) -> None:
        """Start the time limit."""
        self._start = time.perf_counter()

    def pending(self, index: int) -> bool:
        """Return whether the layer is to be measured and not measured yet."""
        return index in self.layers and index not in self.sensitivities

    def in_time(self, index: int) -> bool:
        """Return whether the time limit allows measuring the losses of the layer."""
        due = self._time_limit * self.layers.index(index) / len(self.layers)
        return time.perf_counter() - self._start <= due or index in (self.layers[0], self.layers[-1])

    def add(self, index: int, layer: LayerSensitivity, label: str) -> None:
        """Add the sensitivity of a layer, log it under ``label`` and write the file."""
        self.sensitivities[index] = layer
        heads, columns = layer.heads, layer.columns
        message = "layer %d/%d %s: −%d heads %s, −%d columns %s"
        losses = (heads.count, heads.log_text, columns.count, columns.log_text)
        logger.info(message, index, self._num_layers, label, *losses)
        if self._path:
            layers = {index: asdict(layer) for index, layer in self.sensitivities.items()}
            write_json_atomic(self._path, {**self._header, "layers": layers})


@torch.no_grad()
def measure(
    host: ResidentModel,
    samples: Tensor,
    layers: range,
    settings: PruningSettings,
    cache_file: Path | None = None,
    time_limit: float = math.inf,
) -> dict[int, LayerSensitivity]:
    """Return the sensitivity of every one of ``layers`` of the dense model, by layer index.

    Args:
        host: the whole dense model; its weights are unchanged on return.
        samples: (num_samples, seqlen) calibration token ids.
        layers: the layers to measure.
        settings: how layers are pruned.
        cache_file: file of measurements for an interrupted run to resume from.
        time_limit: seconds, see :class:`SensitivityCache`.

    Raises:
        UserError: if predictions are not finite, naming the layer.
    """
    protocol = [PROBE_STRIDE, REFERENCE_RATIO, MAX_CURVE_RATIO, HEAD_PROBE_SAMPLES, COLUMN_PROBE_SAMPLES, PROBE_TOKENS]
    cache = SensitivityCache(layers, len(host.layers), protocol, cache_file, time_limit)
    if cache.complete:
        return cache.sensitivities
    cache.start_clock()

    def work(settings: PruningSettings) -> None:
        _measure_layers(host, samples, cache, settings)

    retry_with_less_memory(work, settings, samples, host, "measuring")
    return cache.sensitivities


def _measure_layers(host: ResidentModel, samples: Tensor, cache: SensitivityCache, settings: PruningSettings) -> None:
    """Run the dense model layer by layer and measure the pending layers of ``cache``."""
    shapes, last = layer_shapes(host.model.config), cache.layers[-1]
    with host.non_layer_modules(settings.device), logging_redirect_tqdm():
        hidden, calls = capture_layer_kwargs(host.model, host.layers, samples, settings)
        head_probe = KLProbe(host, samples[:HEAD_PROBE_SAMPLES, :PROBE_TOKENS], settings)
        column_probe = KLProbe(host, samples[:COLUMN_PROBE_SAMPLES, :PROBE_TOKENS], settings)
        for index in tqdm(range(last + 1), desc="measuring", unit="layer", disable=None):
            layer = host.onload(index, settings.device)
            forward = LayerForward(layer, host.family, hidden, calls[index], settings)
            if cache.pending(index):
                probes = (head_probe, column_probe) if cache.in_time(index) else (None, None)
                cache.add(index, _layer_sensitivity(forward, probes, index, shapes[index], settings), "sensitivity")
            if index < last:
                forward.advance()
                head_probe.advance(index)
                column_probe.advance(index)
            host.offload(index)


def _layer_sensitivity(
    forward: LayerForward,
    probes: tuple[KLProbe | None, KLProbe | None],
    index: int,
    shape: LayerShape,
    settings: PruningSettings,
) -> LayerSensitivity:
    """Return the sensitivity of layer ``index``; without the probes of heads and columns, the errors alone."""
    heads = columns = UnitSensitivity.without_units()
    if shape.num_heads:
        heads = _unit_sensitivity(head_maps(index, [forward], shape, settings), probes[0], index, settings)
        # The attention is dense again.
        forward.finish_attention()
    if shape.num_columns:
        columns = _unit_sensitivity(column_maps(index, [forward], shape), probes[1], index, settings)
    return LayerSensitivity(heads, columns)


def _unit_sensitivity(
    maps: OutputMaps, probe: KLProbe | None, index: int, settings: PruningSettings
) -> UnitSensitivity:
    """Return the errors with 0, 1, … units of every group removed and the loss; the weights are unchanged on return."""
    errors = error_curve(maps, settings)
    count = reference_count(errors, maps.units_per_group)
    sensitivity = UnitSensitivity(errors.tolist(), count)
    if probe and count < len(errors):
        dense = maps.copies()
        try:
            maps.prune(count, settings)
            # The rest of the model needs the memory.
            maps.release()
            sensitivity.loss = max(probe.divergence(index), MIN_LOSS)
        finally:
            # Also for the retry after an out-of-memory error.
            maps.restore(dense)
    return sensitivity


def error_curve(maps: OutputMaps, settings: PruningSettings, at_least: int = 0) -> Tensor:
    """Return :meth:`OutputMaps.error_curve` up to all units of heads but one, or ``MAX_CURVE_RATIO`` of the columns.

    The curve of columns reaches ``at_least`` columns.
    """
    per_group = maps.units_per_group
    most = per_group - 1 if maps.unit_size > 1 else max(units_to_remove(per_group, MAX_CURVE_RATIO), at_least)
    return maps.error_curve(most, settings, CURVE_STEPS)


def reference_count(errors: Tensor, per_group: int) -> int:
    """Return ``REFERENCE_RATIO`` of the units of a group, or the first count of nonzero error if that is larger.

    The count is ``len(errors)`` if all errors are zero.
    """
    count = min(max(round(REFERENCE_RATIO * per_group), 1), len(errors) - 1)
    # Dead columns are removed first, at zero error; a loss of zero could not be scaled.
    return max(count, int((errors <= REL_TOLERANCE * errors[-1]).sum()))


def loss_curves(sensitivities: dict[int, LayerSensitivity], units: list[LayerUnits]) -> list[LayerCurves]:
    """Return the loss curves of the measured layers in order.

    Args:
        sensitivities: sensitivity by layer index.
        units: units of all layers.
    """
    layers = sorted(sensitivities)
    head_losses = _interpolated([sensitivities[index].heads.loss for index in layers])
    column_losses = _interpolated([sensitivities[index].columns.loss for index in layers])
    curves = []
    for index, head_loss, column_loss in zip(layers, head_losses, column_losses, strict=True):
        layer, unit = sensitivities[index], units[index]
        heads = LossCurve(layer.heads.loss_curve(head_loss), unit.head_cost, column=False)
        columns = LossCurve(layer.columns.loss_curve(column_loss), unit.column_cost, column=True)
        curves.append(LayerCurves(heads, columns))
    return curves


def max_removable(units: list[LayerUnits], layers: range) -> list[tuple[int, int]]:
    """Return the heads and columns of every layer that loss curves cover; none outside of ``layers``."""
    return [
        (layer.heads - 1, layer.removed_by(MAX_CURVE_RATIO)[1]) if index in layers else (0, 0)
        for index, layer in enumerate(units)
    ]


def _interpolated(losses: list[float | None]) -> np.ndarray:
    """Return the losses by layer, with missing ones interpolated in the logarithm."""
    known = {index: loss for index, loss in enumerate(losses) if loss is not None}
    if not known:
        # No layer has units to remove.
        return np.full(len(losses), MIN_LOSS)
    return np.exp(np.interp(range(len(losses)), list(known), np.log(list(known.values()))))
