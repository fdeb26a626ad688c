"""Measured allocation: what removing heads or FFN columns of one layer costs the whole model, layer by layer.

One pass over the dense model gives, for the heads and for the columns of every layer, the OBS error of every count of
units. How much an error there matters is measured once for each: ``REFERENCE_RATIO`` of the units is removed from that
map alone, and the rest of the model is run on a few calibration samples. The KL divergence of its predictions from the
dense model's, scaled by the errors, is the loss curve. Within a time limit only some layers are measured; a layer
between two of them takes its losses from both.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from slim_utils.allocation.budget import LayerUnits, LossCurve
from slim_utils.allocation.schedules import units_to_remove
from slim_utils.common.errors import UserError
from slim_utils.common.loading import write_json_atomic
from slim_utils.families import LayerShape, layer_shapes, linear_map
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs, layer_outputs_given
from slim_utils.layerwise.less_memory import retry_with_less_memory
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.pruner import head_unit
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.slimgpt import SlimGPT

logger = logging.getLogger(__name__)

# Share of the units removed where the loss is measured, and the largest that the curves reach.
REFERENCE_RATIO, MAX_CURVE_RATIO = 0.3, 0.9
# Steps that a curve of columns is made of, unless groups of columns are asked for.
CURVE_STEPS = 64
# Share of the largest error that is as good as none; loss, in nats a token, below which rounding is all there is.
REL_TOLERANCE, LEAST_LOSS = 1e-6, 1e-6
# Calibration samples that the losses of heads and of columns are measured on, and tokens of each. Those of columns,
# which are many, differ less from sample to sample.
PROBE_SAMPLES, PROBE_TOKENS = (4, 2), 512


class KLProbe:
    """A few samples on their way through the dense model, and what it predicts in the end.

    Args:
        host: of the whole model, with what is outside of its layers on the device.
        samples: (few, seqlen) token ids.
        settings: where layers are run.
    """

    def __init__(self, host: ResidentModel, samples: Tensor, settings: PruningSettings) -> None:
        self._host, self._samples, self._settings = host, samples, settings
        self._hidden, self._calls = capture_layer_kwargs(host.model, host.layers, samples, settings)
        self._dense = list(self._log_probabilities(self._outputs(0)))

    def advance(self, index: int) -> None:
        """Go through layer ``index``."""
        self._run(index, self._hidden)

    def divergence(self, index: int) -> float:
        """Mean KL divergence, in nats a token, of the predictions with layers from ``index`` on as they now are.

        Raises:
            UserError: if predictions are not finite.
        """
        total = 0.0
        for dense, changed in zip(self._dense, self._log_probabilities(self._outputs(index)), strict=True):
            total += functional.kl_div(changed, dense, reduction="sum", log_target=True).item()
        if not math.isfinite(total):
            raise UserError(
                f"layer {index}: predictions are not finite where it is pruned; try --dtype bfloat16 or float32"
            )
        return total / self._samples.numel()

    def _outputs(self, index: int) -> Tensor:
        hidden = self._hidden.clone()
        for later in range(index, len(self._host.layers)):
            self._run(later, hidden)
            if later > index:
                self._host.offload(later)
        return hidden

    def _run(self, index: int, hidden: Tensor) -> None:
        device = self._settings.device
        layer = self._host.onload(index, device)
        LayerForward(layer, self._host.family, hidden, self._calls[index], self._settings).advance()

    def _log_probabilities(self, outputs: Tensor) -> Iterator[Tensor]:
        """Log-probabilities (tokens, vocabulary) of every sample; one at a time, as they may outweigh the model."""
        model = self._host.model
        for sample, output in zip(self._samples, outputs, strict=True):
            with layer_outputs_given(self._host.layers, iter([output[None].to(model.device)])):
                logits = model(input_ids=sample[None].to(model.device), use_cache=False).logits
            yield logits[0].float().log_softmax(-1)


@dataclass
class UnitSensitivity:
    """What is known of the heads, or of the FFN columns, of one layer.

    Attributes:
        errors: OBS error of 0, 1, … units.
        count: units that were, or would be, removed to measure the loss.
        loss: the loss of that many, in nats a token; ``None`` where it was not measured.
    """

    errors: list[float]
    count: int
    loss: float | None = None

    @property
    def cost(self) -> str:
        """The loss, for a log line."""
        return "not measured" if self.loss is None else f"{self.loss:.4f} nats"

    def losses(self, loss: float) -> np.ndarray:
        """Losses of 0, 1, … units where those of ``count`` cost ``loss``."""
        errors = np.array(self.errors)
        return errors * (loss / errors[self.count]) if self.count < len(errors) else errors


class SensitivityCache:
    """What is measured of one layer after another, kept in a file as it comes, within the time there is.

    Args:
        layers: those to measure, in their order.
        num_layers: of the model, for the log.
        protocol: what has to be the same for the file to be gone on with.
        path: of the file; ``None`` keeps nothing.
        seconds: a layer's losses are measured where at most its share of this time has passed since :meth:`begin`,
            those of the first and of the last always.
    """

    def __init__(
        self, layers: Sequence[int], num_layers: int, protocol: list[Any], path: Path | None, seconds: float
    ) -> None:
        self.layers, self._num_layers, self._protocol = layers, num_layers, protocol
        self._path, self._seconds = path, seconds
        kept = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        found = kept["layers"] if kept.get("protocol") == protocol else {}
        self.found = {int(index): [UnitSensitivity(**part) for part in parts] for index, parts in found.items()}

    @property
    def complete(self) -> bool:
        """Whether all layers are there.

        Losses that were left out stay so: other ratios would not go with the layers that are pruned by now.
        """
        return len(self.found) == len(self.layers)

    def begin(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def wanted(self, index: int) -> bool:
        """Whether the layer is one of those to measure, and not there yet."""
        return index in self.layers and index not in self.found

    def in_time(self, index: int) -> bool:
        """Whether its losses, too, are to be measured."""
        due = self._seconds * self.layers.index(index) / len(self.layers)
        return time.perf_counter() - self._start <= due or index in (self.layers[0], self.layers[-1])

    def add(self, index: int, parts: list[UnitSensitivity], how: str) -> None:
        """Keep, and log, a layer's heads and columns; ``how`` they were measured."""
        self.found[index] = parts
        heads, columns = parts
        message = "layer %d/%d: %s %d heads: %s, %d columns: %s"
        costs = (heads.count, heads.cost, columns.count, columns.cost)
        logger.info(message, index, self._num_layers, how, *costs)
        if self._path:
            layers = {at: [asdict(part) for part in own] for at, own in self.found.items()}
            write_json_atomic(self._path, {"protocol": self._protocol, "layers": layers})


@torch.no_grad()
def measure(
    host: ResidentModel,
    samples: Tensor,
    layers: range,
    settings: PruningSettings,
    finished: Path | None = None,
    seconds: float = math.inf,
) -> dict[int, list[UnitSensitivity]]:
    """The heads and the FFN columns of every one of ``layers``, by its index.

    Args:
        host: of the whole dense model, which ends as it was.
        samples: (num_samples, seqlen) calibration token ids.
        layers: those that are to be pruned.
        settings: how.
        finished: file that keeps what is measured, so that a run that was cut off does not measure it again.
        seconds: as for :class:`SensitivityCache`.

    Raises:
        UserError: if predictions are not finite, with the layer named.
    """
    protocol = [REFERENCE_RATIO, MAX_CURVE_RATIO, *PROBE_SAMPLES, PROBE_TOKENS]
    shapes = layer_shapes(host.model.config)
    measured = SensitivityCache(layers, len(shapes), protocol, finished, seconds)
    if measured.complete:
        return measured.found
    measured.begin()

    def work(settings: PruningSettings) -> None:
        _measure_layers(host, samples, measured, settings)

    retry_with_less_memory(work, settings, samples, host, "measuring")
    return measured.found


def _measure_layers(
    host: ResidentModel, samples: Tensor, measured: SensitivityCache, settings: PruningSettings
) -> None:
    """Go through the dense model, and measure the layers that are wanted."""
    shapes, last = layer_shapes(host.model.config), measured.layers[-1]
    with host.non_layer_modules(settings.device), logging_redirect_tqdm():
        hidden, calls = capture_layer_kwargs(host.model, host.layers, samples, settings)
        probes = [KLProbe(host, samples[:count, :PROBE_TOKENS], settings) for count in PROBE_SAMPLES]
        for index in tqdm(range(last + 1), desc="measuring", unit="layer", disable=None):
            layer = host.onload(index, settings.device)
            replay = LayerForward(layer, host.family, hidden, calls[index], settings)
            if measured.wanted(index):
                asked = probes if measured.in_time(index) else [None, None]
                measured.add(index, _measured_layer(replay, asked, index, shapes[index], settings), "losing")
            if index < last:
                replay.advance()
                for probe in probes:
                    probe.advance(index)
            host.offload(index)


def loss_curves(
    measured: dict[int, list[UnitSensitivity]], units: list[LayerUnits]
) -> list[tuple[LossCurve, LossCurve]]:
    """Loss curves of the heads and of the FFN columns of every layer that was measured, in their order.

    Args:
        measured: by layer.
        units: of all layers.
    """
    layers = [measured[index] for index in sorted(measured)]
    losses = [_interpolated([parts[kind].loss for parts in layers]) for kind in range(2)]
    return [
        (
            LossCurve(heads.losses(of_heads), own.head_weights, False),
            LossCurve(columns.losses(of_columns), own.column_weights, True),
        )
        for (heads, columns), own, of_heads, of_columns in zip(
            layers, (units[index] for index in sorted(measured)), *losses, strict=True
        )
    ]


def most_removable(units: list[LayerUnits], layers: range) -> int:
    """Block weights of ``layers`` that curves reach at most."""
    return sum(
        (own.heads - 1) * own.head_weights + own.removed_by(MAX_CURVE_RATIO)[1] * own.column_weights
        for own in units[layers.start : layers.stop]
    )


def _interpolated(losses: list[float | None]) -> np.ndarray:
    """Losses by layer, those that were not measured between the logarithms of their neighbours'."""
    known = {index: loss for index, loss in enumerate(losses) if loss is not None}
    if not known:
        # Neither the first nor the last has anything to lose here.
        return np.full(len(losses), LEAST_LOSS)
    return np.exp(np.interp(range(len(losses)), list(known), np.log(list(known.values()))))


def _measured_layer(
    replay: LayerForward, probes: Sequence[KLProbe | None], index: int, shape: LayerShape, settings: PruningSettings
) -> list[UnitSensitivity]:
    """The heads and the columns of a layer, their losses too where there is a probe of each."""
    family = replay.family
    unit_size, groups, _ = head_unit(shape, settings)
    parts = []
    for probe, (name, inputs, size, num_groups) in zip(
        probes,
        (
            (family.attention_out, replay.attention_inputs(), unit_size, groups),
            (family.mlp_out, _column_inputs(replay), 1, 1),
        ),
        strict=True,
    ):
        pruner = SlimGPT(linear_map(replay.layer, name), f"layer {index} {name}")
        for batch in inputs:
            pruner.add_batch(batch)
        parts.append(_measured(pruner, probe, index, size, num_groups, settings))
    return parts


def error_curve(
    pruner: SlimGPT, unit_size: int, num_groups: int, settings: PruningSettings, at_least: int = 0
) -> Tensor:
    """:meth:`SlimGPT.error_curve` of all units of heads but one, or of ``MAX_CURVE_RATIO`` of the columns.

    It goes as far as ``at_least`` units.
    """
    per_group = pruner.columns // unit_size // num_groups
    most = per_group - 1 if unit_size > 1 else max(units_to_remove(per_group, MAX_CURVE_RATIO), at_least)
    group = settings.selection.column_group or math.ceil(pruner.columns / CURVE_STEPS)
    fine = replace(settings.selection, column_group=group)
    return pruner.error_curve(most * num_groups, unit_size, settings.percdamp, num_groups, fine, settings.solve_dtype)


def reference_count(errors: Tensor, per_group: int) -> int:
    """``REFERENCE_RATIO`` of the units of a group, where ``errors`` has so many; all of them if they cost nothing."""
    count = min(max(round(REFERENCE_RATIO * per_group), 1), len(errors) - 1)
    # Columns that are never active go first, at no cost, and tell nothing of the others.
    return max(count, int((errors <= REL_TOLERANCE * errors[-1]).sum()))


def _column_inputs(replay: LayerForward) -> Iterator[Tensor]:
    """Of the FFN's output map, after the attention as it was."""
    replay.finish_attention()
    yield from replay.column_inputs()


def _measured(
    pruner: SlimGPT, probe: KLProbe | None, index: int, unit_size: int, num_groups: int, settings: PruningSettings
) -> UnitSensitivity:
    """Errors of 0, 1, … units of every group, and a loss; the weights stay as they are."""
    errors = error_curve(pruner, unit_size, num_groups, settings)
    per_group = pruner.columns // unit_size // num_groups
    count = reference_count(errors, per_group)
    sublayer = UnitSensitivity(errors.tolist(), count)
    if probe and count < len(errors):
        dense = pruner.linear.weight.clone()
        try:
            pruner.struct_prune(
                count * num_groups,
                unit_size,
                settings.percdamp,
                True,
                num_groups,
                settings.selection,
                settings.solve_dtype,
            )
            sublayer.loss = max(probe.divergence(index), LEAST_LOSS)
        finally:
            # Also where memory was full, and all is tried once more.
            pruner.linear.weight.copy_(dense)
    return sublayer
