"""Refinement of an allocation: a few units move between layers to reduce the loss of the pruned model.

What a head or an FFN column is worth depends on everything else that is removed, which neither a schedule nor losses of
the dense model take into account.

1. Prune the model by the current plan; before each map is pruned, compute its OBS errors and its weights with a few
   units more and a few units fewer removed.
2. For the heads and for the columns of every layer, swap in those candidate weights and measure the KL divergence of
   the pruned model from the dense model.
3. Scale the errors to the difference of the divergences: the loss curve near the plan.
4. Restore the dense model; allocate the budget anew within a few units of the plan.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from slim_utils.allocation.budget import LayerCurves, LayerUnits, LossCurve, allocate_layers, plans_of_counts
from slim_utils.allocation.sensitivity import (
    MIN_LOSS,
    PROBE_STRIDE,
    PROBE_TOKENS,
    REL_TOLERANCE,
    KLProbe,
    LayerSensitivity,
    SensitivityCache,
    UnitSensitivity,
    error_curve,
    loss_curves,
    reference_count,
)
from slim_utils.families import Family, layer_shapes, linear_map
from slim_utils.layerwise.layer_maps import column_parameters
from slim_utils.layerwise.less_memory import retry_with_less_memory
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.output_maps import OutputMaps, restore_parameters
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import copied_parameters, put_back_parameters
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerPlan

logger = logging.getLogger(__name__)

# Fractions of a layer's units: the change for the candidate weights, and the largest change of the plan in a round.
PROBE_STEP, MAX_MOVE = 1 / 16, 1 / 8
# Calibration samples for the divergences, whose difference for a few units is small next to that between samples.
REFINEMENT_SAMPLES = 4


def unit_fraction(fraction: float, total: int) -> int:
    """Return a fraction of ``total`` units, at least one unit."""
    return max(1, round(total * fraction))


@dataclass
class _ProbedMap:
    """The output maps of the heads or of the columns of a layer, probed before they were pruned.

    Attributes:
        errors: (n,) fp64 OBS error with 0, 1, … units of every group removed.
        reference: reference count of the loss curve.
        count: units removed by the plan.
        candidate_weights: weights of the maps on the host, by other numbers of units removed.
    """

    errors: Tensor
    reference: int
    count: int
    candidate_weights: dict[int, list[Tensor]]

    def sensitivity(self, losses: dict[int, float]) -> UnitSensitivity:
        """Return the sensitivity with the loss per error measured near the plan.

        A difference of losses that is not positive is noise; the loss is then unknown.

        Args:
            losses: loss of the pruned model by units removed; that of the plan alone where no others were measured.
        """
        unknown = UnitSensitivity(self.errors.tolist(), self.reference)
        fewer, more = min(losses), max(losses)
        error_change = (self.errors[more] - self.errors[fewer]).item()
        if (
            losses[more] <= losses[fewer]
            or error_change <= REL_TOLERANCE * self.errors[-1]
            or self.reference >= len(self.errors)
        ):
            return unknown
        loss_per_error = (losses[more] - losses[fewer]) / error_change
        return replace(unknown, loss=max(loss_per_error * self.errors[self.reference].item(), MIN_LOSS))


class _ProbeHook:
    """Prune hook that probes every layer's maps before they are pruned.

    Attributes:
        maps: the probed maps by layer and name.
    """

    def __init__(self, family: Family, settings: PruningSettings) -> None:
        self._family, self._settings = family, settings
        self.maps: dict[tuple[int, str], _ProbedMap] = {}

    def __call__(self, index: int, maps: OutputMaps, count: int) -> None:
        """Probe ``maps`` of layer ``index``, of which ``count`` units of every group are about to be pruned."""
        settings, per_group = self._settings, maps.units_per_group
        errors = error_curve(maps, settings, count)
        step = unit_fraction(PROBE_STEP, per_group)
        candidates = {max(count - step, 0), min(count + step, len(errors) - 1)} - {count}
        if self._family.head_norms and maps.name == self._family.attention_out:
            # The rows that feed removed heads are zeroed under these norms, so removed heads cannot be restored.
            candidates = {candidate for candidate in candidates if candidate > count}
        dense, candidate_weights = maps.copies(), {}
        for candidate in candidates:
            maps.prune(candidate, settings)
            candidate_weights[candidate] = maps.copies("cpu")
            maps.restore(dense)
        probed = _ProbedMap(errors, reference_count(errors, per_group), count, candidate_weights)
        self.maps[index, maps.name] = probed


@torch.no_grad()
def measure_around(
    host: ResidentModel,
    samples: Tensor,
    sink_windows: Tensor | None,
    plans: Sequence[LayerPlan],
    settings: PruningSettings,
    cache_file: Path | None = None,
    time_limit: float = math.inf,
) -> dict[int, LayerSensitivity]:
    """Return the sensitivity of every pruned layer, by layer index, around ``plans`` on the model pruned by them.

    Args:
        host: the whole dense model; its weights are unchanged on return.
        samples: (num_samples, seqlen) calibration token ids.
        sink_windows: (count, 8) sink windows, as for :func:`prune_layers`.
        plans: plan of every layer; layers with an empty plan are not measured.
        settings: how layers are pruned.
        cache_file: file of measurements for an interrupted run to resume from.
        time_limit: seconds after the pruning, see :class:`~slim_utils.allocation.sensitivity.SensitivityCache`.

    Returns:
        Sensitivities whose loss is that of ``REFERENCE_RATIO`` of the units at the loss per error of the units removed
        or kept next.

    Raises:
        UserError: if activations or predictions are not finite, naming the layer.
    """
    family, layers = host.family, [index for index, plan in enumerate(plans) if plan]
    counts = [[plan.heads, plan.columns] for plan in plans]
    protocol = [PROBE_STEP, PROBE_STRIDE, REFINEMENT_SAMPLES, PROBE_TOKENS, *counts]
    cache = SensitivityCache(layers, len(plans), protocol, cache_file, time_limit)
    if cache.complete:
        return cache.sensitivities

    def work(settings: PruningSettings) -> None:
        with host.non_layer_modules(settings.device):
            probe = KLProbe(host, samples[:REFINEMENT_SAMPLES, :PROBE_TOKENS], settings)
        hook, dense = _ProbeHook(family, settings), [copied_parameters(layer, family) for layer in host.layers]
        try:
            logger.info("refining: pruning the model by the current plan")
            prune_layers(host.model, family, samples, plans, settings, host=host, starts=sink_windows, hook=hook)
            _measure_layers(host, cache, hook, probe, settings)
        finally:
            for layer, copies in zip(host.layers, dense, strict=True):
                put_back_parameters(layer, family, copies)

    retry_with_less_memory(work, settings, samples, host, "refining")
    return cache.sensitivities


def _measure_layers(
    host: ResidentModel, cache: SensitivityCache, hook: _ProbeHook, probe: KLProbe, settings: PruningSettings
) -> None:
    """Run the pruned model layer by layer and measure the pending layers of ``cache``."""
    family, shapes = host.family, layer_shapes(host.model.config)
    with host.non_layer_modules(settings.device), logging_redirect_tqdm():
        plan_loss = probe.divergence(0)
        cache.start_clock()
        logger.info("refining: loss of the current plan %.4f nats", plan_loss)
        for index in tqdm(range(cache.layers[-1] + 1), desc="refining", unit="layer", disable=None):
            layer = host.onload(index, settings.device)
            if cache.pending(index):
                layer_probe = probe if cache.in_time(index) else None
                shape = shapes[index]
                heads = columns = UnitSensitivity.without_units()
                if shape.num_heads:
                    weights = [linear_map(layer, family.attention_out).weight.data]
                    probed = hook.maps[index, family.attention_out]
                    heads = _unit_sensitivity(weights, probed, layer_probe, index, plan_loss)
                if shape.num_columns:
                    weights = column_parameters(layer, family, shape)
                    probed = hook.maps[index, family.experts if shape.num_experts else family.mlp_out]
                    columns = _unit_sensitivity(weights, probed, layer_probe, index, plan_loss)
                cache.add(index, LayerSensitivity(heads, columns), "refined sensitivity")
            probe.advance(index)
            host.offload(index)


def _unit_sensitivity(
    parameters: list[Tensor], probed: _ProbedMap, probe: KLProbe | None, index: int, plan_loss: float
) -> UnitSensitivity:
    """Return the sensitivity of maps of layer ``index`` with these weights; without a probe, the errors alone."""
    losses, pruned = {probed.count: plan_loss}, [parameter.clone() for parameter in parameters]
    if probe:
        for count, weights in probed.candidate_weights.items():
            restore_parameters(parameters, weights)
            losses[count] = probe.divergence(index)
    restore_parameters(parameters, pruned)
    return probed.sensitivity(losses)


def refined_plans(
    sensitivities: dict[int, LayerSensitivity],
    units: list[LayerUnits],
    plans: Sequence[LayerPlan],
    budget: float,
    multiples: Sequence[tuple[int, int]] = (),
) -> list[LayerPlan]:
    """Return the plans of least loss near ``plans`` that remove ``budget``.

    In every layer, the heads and the columns each change by at most ``MAX_MOVE`` of the units, or one multiple: as much
    as a layer of ``plans`` that keeps multiples may be away from the budget.

    Args:
        sensitivities: sensitivity by layer index, of :func:`measure_around`.
        units: units of all layers.
        plans: plan of every layer that the sensitivities were measured around.
        budget: what to remove from the measured layers; the other layers stay dense.
        multiples: multiples of heads and of columns that every layer keeps, in units; 1 by default.

    Raises:
        UnreachableTargetError: if that is more than the layers have within these limits.
    """
    layers, curves = sorted(sensitivities), []
    for index, layer in zip(layers, loss_curves(sensitivities, units), strict=True):
        heads, columns = units[index].counts(plans[index])
        heads_multiple, columns_multiple = multiples[index] if multiples else (1, 1)
        curves.append(
            LayerCurves(
                _within(layer.heads, heads, max(unit_fraction(MAX_MOVE, units[index].heads), heads_multiple)),
                _within(layer.columns, columns, max(unit_fraction(MAX_MOVE, units[index].columns), columns_multiple)),
            )
        )
    counts = allocate_layers(curves, budget)
    return plans_of_counts(dict(zip(layers, counts, strict=True)), units)


def _within(curve: LossCurve, count: int, max_move: int) -> LossCurve:
    """Return ``curve`` cut after ``count + max_move`` units and flat below ``count − max_move`` units."""
    losses = curve.losses[: count + max_move + 1].copy()
    lowest = max(count - max_move, 0)
    losses[:lowest] = losses[lowest]
    return replace(curve, losses=losses)
