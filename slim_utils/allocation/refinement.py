"""Refined allocation: units move to where they are worth more to the pruned model, a few of every layer at a time.

What a head or an FFN column is worth changes with all else that goes, which neither a schedule nor losses measured on
the dense model know. Here the model is pruned as planned; for the heads and for the columns of every layer it is then
measured how far its predictions are from the dense model's with a few more of them gone, and with a few fewer. The
difference, by the OBS errors at the inputs that the layer now gets, is the loss curve near the plan.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from slim_utils.allocation.budget import LayerUnits, LossCurve, allocate, plans_of_counts
from slim_utils.allocation.sensitivity import (
    LEAST_LOSS,
    PROBE_TOKENS,
    REL_TOLERANCE,
    KLProbe,
    SensitivityCache,
    UnitSensitivity,
    error_curve,
    loss_curves,
    reference_count,
)
from slim_utils.families import Family, linear_map
from slim_utils.layerwise.less_memory import retry_with_less_memory
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import copied_parameters, put_back_parameters
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerPlan
from slim_utils.slimgpt import SlimGPT

logger = logging.getLogger(__name__)

# Shares of a layer's units: those more or fewer that the divergence is measured with, and those that may move.
PROBE_STEP, MAX_MOVE = 1 / 16, 1 / 8
# Calibration samples that it is measured on: what a few units change is little beside what samples differ by.
REFINEMENT_SAMPLES = 4


def units_of(share: float, total: int) -> int:
    """So many units of ``total``, at least one."""
    return max(1, round(total * share))


@dataclass
class _ProbedMap:
    """The heads or the FFN columns of a layer, as they were before the layer-wise pruner pruned them.

    Attributes:
        errors: (n,) fp64, OBS error of 0, 1, … units of every group.
        reference: units whose loss stands for the curve.
        count: units that went.
        candidate_weights: the output map's weights, on the host, had other counts gone.
    """

    errors: Tensor
    reference: int
    count: int
    candidate_weights: dict[int, Tensor]

    def sublayer(self, losses: dict[int, float]) -> UnitSensitivity:
        """With the loss of ``reference`` units, if all cost as much, by their errors, as those near ``count``.

        Where a difference of losses is not positive it is noise, and nothing is known.

        Args:
            losses: of the pruned model, by count; of ``count`` alone where they were not measured.
        """
        known = UnitSensitivity(self.errors.tolist(), self.reference)
        fewer, more = min(losses), max(losses)
        rise = (self.errors[more] - self.errors[fewer]).item()
        if (
            losses[more] <= losses[fewer]
            or rise <= REL_TOLERANCE * self.errors[-1]
            or self.reference >= len(self.errors)
        ):
            return known
        price = (losses[more] - losses[fewer]) / rise
        return replace(known, loss=max(price * self.errors[self.reference].item(), LEAST_LOSS))


class _ProbeHook:
    """Prune hook that probes every map before it is pruned; ``places`` holds them, by layer and name of the map."""

    def __init__(self, family: Family, settings: PruningSettings) -> None:
        self._family, self._settings = family, settings
        self.places: dict[tuple[int, str], _ProbedMap] = {}

    def __call__(self, index: int, name: str, pruner: SlimGPT, count: int, unit_size: int, num_groups: int) -> None:
        """Of the map ``name`` of layer ``index``; the rest as for :meth:`SlimGPT.struct_prune`."""
        settings = self._settings
        per_group, count = pruner.columns // unit_size // num_groups, count // num_groups
        errors = error_curve(pruner, unit_size, num_groups, settings, count)
        step = units_of(PROBE_STEP, per_group)
        others = {max(count - step, 0), min(count + step, len(errors) - 1)} - {count}
        if self._family.head_norms and name == self._family.attention_out:
            # What feeds the heads that go is zeroed there, so none can stay for a trial.
            others = {other for other in others if other > count}
        weight, candidate_weights = pruner.linear.weight, {}
        dense = weight.clone()
        for other in others:
            pruner.struct_prune(
                other * num_groups,
                unit_size,
                settings.percdamp,
                num_groups=num_groups,
                selection=settings.selection,
                solve_dtype=settings.solve_dtype,
            )
            candidate_weights[other] = weight.to("cpu", copy=True)
            weight.copy_(dense)
        self.places[index, name] = _ProbedMap(errors, reference_count(errors, per_group), count, candidate_weights)


@torch.no_grad()
def measure_around(
    host: ResidentModel,
    samples: Tensor,
    starts: Tensor | None,
    plans: Sequence[LayerPlan],
    settings: PruningSettings,
    finished: Path | None = None,
    seconds: float = math.inf,
) -> dict[int, list[UnitSensitivity]]:
    """What more heads and FFN columns would cost, and fewer save, in every layer of the model pruned by ``plans``.

    Args:
        host: of the whole dense model, which ends as it was.
        samples: (num_samples, seqlen) calibration token ids.
        starts: (count, 8) sink windows, as :func:`prune_layers` takes them.
        plans: of every layer; one of an empty plan is not measured.
        settings: how.
        finished: file that keeps what is measured, so that a run that was cut off does not measure it again.
        seconds: as for :class:`slim_utils.allocation.sensitivity.SensitivityCache`, after the pruning.

    Returns:
        The heads and the columns of every layer, by its index; a loss is what ``REFERENCE_RATIO`` of the units would
        cost if all cost as much, by their errors, as those that are removed or kept next.

    Raises:
        UserError: if activations or predictions are not finite, with the layer named.
    """
    family, layers = host.family, [index for index, plan in enumerate(plans) if plan]
    protocol = [PROBE_STEP, REFINEMENT_SAMPLES, PROBE_TOKENS, *([plan.heads, plan.columns] for plan in plans)]
    measured = SensitivityCache(layers, len(plans), protocol, finished, seconds)
    if measured.complete:
        return measured.found

    def work(settings: PruningSettings) -> None:
        with host.non_layer_modules(settings.device):
            probe = KLProbe(host, samples[:REFINEMENT_SAMPLES, :PROBE_TOKENS], settings)
        hook, dense = _ProbeHook(family, settings), [copied_parameters(layer, family) for layer in host.layers]
        try:
            logger.info("refining: the model is pruned as planned")
            prune_layers(host.model, family, samples, plans, settings, host=host, starts=starts, hook=hook)
            _measure_layers(host, measured, hook, probe, settings)
        finally:
            for layer, copies in zip(host.layers, dense, strict=True):
                put_back_parameters(layer, family, copies)

    retry_with_less_memory(work, settings, samples, host, "refining")
    return measured.found


def _measure_layers(
    host: ResidentModel, measured: SensitivityCache, hook: _ProbeHook, probe: KLProbe, settings: PruningSettings
) -> None:
    """Go through the pruned model, and measure the layers that are wanted."""
    family = host.family
    with host.non_layer_modules(settings.device), logging_redirect_tqdm():
        planned = probe.divergence(0)
        measured.begin()
        logger.info("refining: as planned %.4f nats", planned)
        for index in tqdm(range(measured.layers[-1] + 1), desc="refining", unit="layer", disable=None):
            layer = host.onload(index, settings.device)
            if measured.wanted(index):
                places = {name: hook.places[index, name] for name in (family.attention_out, family.mlp_out)}
                asked = probe if measured.in_time(index) else None
                parts = _measured_around(layer, index, places, asked, planned)
                measured.add(index, parts, "at the price of now,")
            probe.advance(index)
            host.offload(index)


def _measured_around(
    layer: nn.Module, index: int, places: dict[str, _ProbedMap], probe: KLProbe | None, planned: float
) -> list[UnitSensitivity]:
    """The heads and the columns of layer ``index``, their losses too where there is a probe; as planned it is known."""
    parts = []
    for name, place in places.items():
        weight = linear_map(layer, name).weight
        losses, now = {place.count: planned}, weight.clone()
        if probe:
            for count, other in place.candidate_weights.items():
                weight.copy_(other)
                losses[count] = probe.divergence(index)
        weight.copy_(now)
        parts.append(place.sublayer(losses))
    return parts


def refined_plans(
    measured: dict[int, list[UnitSensitivity]], units: list[LayerUnits], plans: Sequence[LayerPlan], budget: float
) -> list[LayerPlan]:
    """Plans near ``plans`` of the least loss that remove ``budget`` block weights.

    Of each layer at most ``MAX_MOVE`` of its heads and of its columns move, at least one of each.

    Args:
        measured: by :func:`measure_around`.
        units: of all layers.
        plans: those that it was measured around.
        budget: block weights; what layers that were not measured lose is none of it.

    Raises:
        UserError: if the layers have fewer weights.
    """
    curves, layers = [], sorted(measured)
    for index, pair in zip(layers, loss_curves(measured, units), strict=True):
        own = units[index]
        for curve, count, total in zip(pair, own.counts(plans[index]), (own.heads, own.columns), strict=True):
            curves.append(_near(curve, count, units_of(MAX_MOVE, total)))
    counts = allocate(curves, budget)
    pairs = zip(counts[::2], counts[1::2], strict=True)
    return plans_of_counts(dict(zip(layers, pairs, strict=True)), units)


def _near(curve: LossCurve, count: int, most: int) -> LossCurve:
    """``curve`` of counts that differ by ``most`` from ``count``; fewer still would save nothing."""
    losses = curve.losses[: count + most + 1].copy()
    lowest = max(count - most, 0)
    losses[:lowest] = losses[lowest]
    return replace(curve, losses=losses)
