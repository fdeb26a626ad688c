"""Measured allocation: what removing heads or FFN columns of one layer costs the whole model, layer by layer.

One pass over the dense model gives, for the heads and for the columns of every layer, the OBS error of every count of
units. How much an error there matters is measured once for each: ``REFERENCE`` of the units is removed from that place
alone, and the rest of the model is run on a few calibration samples. The divergence of its predictions from the dense
model's, scaled by the errors, is the loss curve.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from slim_utils.allocation import LayerUnits, LossCurve
from slim_utils.families import LayerShape
from slim_utils.layer_host import LayerHost
from slim_utils.layer_replay import LayerReplay, capture_layer_calls, layer_outputs_given
from slim_utils.layer_walk import head_unit
from slim_utils.model_io import write_json_atomic
from slim_utils.slimgpt import SlimGPT
from slim_utils.walk_settings import WalkSettings

logger = logging.getLogger(__name__)

# Share of the units removed where the loss is measured, and the largest that the curves reach.
REFERENCE, FURTHEST = 0.3, 0.9
# Steps that a curve of columns is made of, unless groups of columns are asked for.
CURVE_STEPS = 64
# Share of the largest error that is as good as none; loss, in nats a token, below which rounding is all there is.
NEGLIGIBLE, LEAST_LOSS = 1e-6, 1e-6
# Calibration samples that losses are measured on.
PROBE_SAMPLES = 4


class Probe:
    """A few samples on their way through the dense model, and what it predicts in the end.

    Args:
        host: of the whole model, with what is outside of its layers on the device.
        samples: (few, seqlen) token ids.
        settings: where layers are run.
    """

    def __init__(self, host: LayerHost, samples: Tensor, settings: WalkSettings) -> None:
        self._host, self._samples, self._settings = host, samples, settings
        self._hidden, self._calls = capture_layer_calls(host.model, host.layers, samples, settings)
        self._dense = self._outputs(0)

    def advance(self, index: int) -> None:
        """Go through layer ``index``."""
        self._run(index, self._hidden)

    def divergence(self, index: int) -> float:
        """Mean KL divergence, in nats a token, of the predictions with layers from ``index`` on as they now are."""
        pruned, total = self._outputs(index), 0.0
        for sample in range(len(self._samples)):
            # One at a time: the logits of a batch may outweigh the model.
            dense, changed = (self._log_probabilities(outputs, sample) for outputs in (self._dense, pruned))
            total += functional.kl_div(changed, dense, reduction="sum", log_target=True).item()
        return total / self._samples.numel()

    def _outputs(self, index: int) -> Tensor:
        hidden = self._hidden.clone()
        for later in range(index, len(self._host.layers)):
            self._run(later, hidden)
            if later > index:
                self._host.release(later)
        return hidden

    def _run(self, index: int, hidden: Tensor) -> None:
        device = self._settings.device
        layer = self._host.fetch(index, device)
        calls = send_to_device(self._calls[index], device)
        LayerReplay(layer, self._host.family, hidden, calls, self._settings).advance()

    def _log_probabilities(self, outputs: Tensor, sample: int) -> Tensor:
        model = self._host.model
        given = iter([outputs[sample : sample + 1].to(model.device)])
        with layer_outputs_given(self._host.layers, given):
            logits = model(input_ids=self._samples[sample : sample + 1].to(model.device), use_cache=False).logits
        return logits[0].float().log_softmax(-1)


@torch.no_grad()
def loss_curves(
    host: LayerHost,
    samples: Tensor,
    shapes: list[LayerShape],
    units: list[LayerUnits],
    settings: WalkSettings,
    finished: Path | None = None,
) -> list[LossCurve]:
    """Loss curves of the heads and of the FFN columns of every layer, in this order.

    Args:
        host: of the whole dense model, which ends as it was.
        samples: (num_samples, seqlen) calibration token ids.
        shapes: of the layers.
        units: of the layers.
        settings: how.
        finished: file that keeps what is measured, so that a run that was cut off does not measure it again.
    """
    kept = json.loads(finished.read_text(encoding="utf-8")) if finished and finished.exists() else {}
    family = host.family
    curves = []
    with host.outside(settings.device), logging_redirect_tqdm():
        hidden, calls = capture_layer_calls(host.model, host.layers, samples, settings)
        probe = Probe(host, samples[:PROBE_SAMPLES], settings)
        for index in tqdm(range(len(host.layers)), desc="measuring", unit="layer", disable=None):
            layer = host.fetch(index, settings.device)
            replay = LayerReplay(layer, family, hidden, send_to_device(calls[index], settings.device), settings)
            if str(index) not in kept:
                unit_size, groups, _ = head_unit(shapes[index], settings)
                measured = []
                places = [(family.attention_out, replay.attention_inputs(), unit_size, groups)]
                places.append((family.mlp_out, _column_inputs(replay), 1, 1))
                for name, inputs, size, num_groups in places:
                    pruner = SlimGPT(layer.get_submodule(name), f"layer {index} {name}")
                    for batch in inputs:
                        pruner.add_batch(batch)
                    measured.append(_measured(pruner, probe, index, size, num_groups, settings))
                kept[str(index)] = measured
                if finished:
                    write_json_atomic(finished, kept)
            heads, columns = (np.array(losses) for losses in kept[str(index)])
            curves += [LossCurve(heads, units[index].head_weights, False)]
            curves += [LossCurve(columns, units[index].column_weights, True)]
            replay.advance()
            probe.advance(index)
            host.release(index)
            logger.info(
                "layer %d/%d: all heads but one would cost %.4f nats, %.0f %% of the columns %.4f",
                *(index, len(host.layers), heads[-1], 100 * FURTHEST, columns[-1]),
            )
    return curves


def _column_inputs(replay: LayerReplay) -> Iterator[Tensor]:
    """Of the FFN's output map, after the attention as it was."""
    replay.finish_attention()
    yield from replay.column_inputs()


def _measured(
    pruner: SlimGPT, probe: Probe, index: int, unit_size: int, num_groups: int, settings: WalkSettings
) -> list[float]:
    """Losses of 0, 1, … units of every group; the weights stay as they are."""
    furthest = 1.0 if unit_size > 1 else FURTHEST
    group = settings.choices.column_group or math.ceil(pruner.columns / CURVE_STEPS)
    fine = replace(settings.choices, column_group=group)
    errors = pruner.error_curve(furthest, unit_size, settings.percdamp, num_groups, fine)
    dense = pruner.linear.weight.clone()
    per_group = pruner.columns // unit_size // num_groups
    count = min(max(round(REFERENCE * per_group), 1), len(errors) - 1)
    # Columns that are never active go first, at no cost, and tell nothing of the others.
    count = max(count, int((errors <= NEGLIGIBLE * errors[-1]).sum()))
    if count >= len(errors):
        return errors.tolist()
    pruner.struct_prune(count / per_group, unit_size, settings.percdamp, True, num_groups, settings.choices)
    loss = max(probe.divergence(index), LEAST_LOSS)
    pruner.linear.weight.copy_(dense)
    return (errors * (loss / errors[count])).tolist()
