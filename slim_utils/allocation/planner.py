"""Planner: the plan of every layer by ratios, a target, a sensitivity analysis or another run's profile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slim_utils.allocation.alignment import Alignment
from slim_utils.allocation.budget import (
    LayerUnits,
    allocate_with_depth_decay,
    layer_units,
    plans_of_counts,
    read_profile,
    scaled_counts,
    unreachable_target,
)
from slim_utils.allocation.latency_target import LatencyTarget, latency_target_of
from slim_utils.allocation.refinement import measure_around, refined_plans
from slim_utils.allocation.schedules import layer_range, layer_ratios, non_uniform_ratios, units_to_remove
from slim_utils.allocation.sensitivity import LayerSensitivity, loss_curves, max_removable, measure
from slim_utils.allocation.targets import Allocate, Target, share_text, target_of
from slim_utils.common.errors import UserError
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.layerwise.device_defaults import CPU_TOKENS_PER_FORWARD, resolve_solve_dtype
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.obs import SelectionOptions
from slim_utils.profiling.latency_table import LatencyTable
from slim_utils.profiling.model_stats import removed_share
from slim_utils.pruned_config import stock_config
from slim_utils.pruning_config import SENSITIVITY, PruningConfig
from slim_utils.routers import active_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def no_cache(refinement: int) -> Path | None:
    """Return no cache file for any round of refinement."""
    return None


def pruning_settings(config: PruningConfig) -> PruningSettings:
    """Return the pruning settings of ``config``, whose devices are resolved."""
    return PruningSettings(
        device=config.torch_device,
        cache_dev=config.torch_cache_dev,
        batch_samples=config.batch_samples,
        percdamp=config.percdamp,
        compensate=not config.no_compensate,
        selection=SelectionOptions(config.exact_heads, config.column_group or 0),
        gqa_unit=config.gqa_unit,
        tokens_per_forward=config.tokens_per_forward or CPU_TOKENS_PER_FORWARD,
        solve_dtype=resolve_solve_dtype(config.solve_dtype, config.torch_device),
        whole_experts=config.whole_experts,
    )


def alignment(config: PruningConfig, expert_groups: int = 1) -> Alignment:
    """Return the multiples of ``config`` that layers keep, and of ``expert_groups`` where experts are removed."""
    return Alignment(
        heads_multiple=math.lcm(2 if config.even_heads else 1, config.tp_size),
        columns_multiple=math.lcm(config.multiple_of, config.tp_size, expert_groups if config.whole_experts else 1),
        tp_size=config.tp_size,
        uniform=config.uniform_shapes or config.whole_experts,
    )


@dataclass
class Sensitivities:
    """Sensitivities that plans are allocated by, by layer index; empty if not measured.

    Attributes:
        dense: measured on the dense model by the sensitivity analysis.
        refined: measured on the pruned model in the last round of refinement.
    """

    dense: dict[int, LayerSensitivity] = field(default_factory=dict)
    refined: dict[int, LayerSensitivity] = field(default_factory=dict)


class Planner:
    """Makes the plans of all layers of a model.

    Args:
        config: flags of the run.
        host: the model; its weights may be on the meta device except for :meth:`measured_plans`.
        table: latency table of the model, for ``--target_latency``.

    Attributes:
        settings: how layers are pruned.
        shapes: shape of every layer.
    """

    def __init__(self, config: PruningConfig, host: ResidentModel, table: LatencyTable | None = None) -> None:
        self._config, self._host, self._table = config, host, table
        self._alignment = alignment(config, host.family.num_expert_groups(host.model.config))
        self.settings = pruning_settings(config)
        self.shapes: list[LayerShape] = layer_shapes(host.model.config)

    @cached_property
    def target(self) -> Target:
        """What is removed in total, and the units with what they count in it.

        Raises:
            UserError: if the target is not smaller than the model.
        """
        units = layer_units(self._host.layers, self._host.family, self.shapes, self.settings)
        if self._table:
            return latency_target_of(self._config, self._table, units)
        return target_of(self._config, self._host.model, units, self.settings)

    @property
    def units(self) -> list[LayerUnits]:
        """Units of every layer."""
        return self.target.units

    @cached_property
    def layers(self) -> range:
        """Layers in the range to prune."""
        return layer_range(self._config.minlayer, self._config.maxlayer, len(self.shapes))

    def plans(self) -> list[LayerPlan]:
        """Return the plans of the ratios, of a schedule scaled to the target, or of another run's profile.

        Raises:
            UserError: if the target cannot be met.
        """
        if self._config.profile:
            return self._aligned(read_profile(self._config.profile, self.units, self.shapes))
        if self._config.has_target:
            return self.target.plans_by(self._scaled_plans)
        return ratio_plans(self._ratios(), self.units, self._alignment)

    def check_measurable(self) -> None:
        """Check, before the weights are loaded, that the allocation can be measured and can meet the target.

        Raises:
            UserError: if it cannot, naming the flag to change.
        """
        most = self.target.removed(max_removable(self.units, self.layers))
        if self._config.allocation != SENSITIVITY:
            self.plans()
        if most < self.target.budget:
            raise unreachable_target(most, self.target.budget)

    def measured_plans(
        self, samples: Tensor, sink_windows: Tensor | None, cache_file: Callable[[int], Path | None] = no_cache
    ) -> tuple[list[LayerPlan], Sensitivities]:
        """Return the plans of ``--allocation search`` and ``--refine``, and the sensitivities measured for them.

        The weights of the dense model are unchanged on return.

        Args:
            samples: (num_samples, seqlen) calibration token ids.
            sink_windows: (count, 8) sink windows; ``None`` for none.
            cache_file: maps a round of refinement, or 0 for the sensitivity analysis, to its file of measurements.

        Raises:
            UserError: if predictions are not finite, or the target cannot be met.
        """
        minutes, sensitivities = self._config.search_minutes, Sensitivities()
        time_limit = math.inf if minutes is None else 60 * minutes
        if self._config.allocation == SENSITIVITY:
            sensitivities.dense = measure(self._host, samples, self.layers, self.settings, cache_file(0), time_limit)
            plans = self._plans_of_least_loss(sensitivities.dense)
        else:
            plans = self.plans()
        for number in range(1, self._config.refine + 1):
            sensitivities.refined = measure_around(
                self._host, samples, sink_windows, plans, self.settings, cache_file(number), time_limit
            )
            plans = self.target.plans_by(self._refined(sensitivities.refined, plans), plans)
        return plans, sensitivities

    def size_masks(self, plans: list[LayerPlan]) -> list[LayerMask]:
        """Return size-only masks of ``plans``; logs empty plans and layers that cannot be aligned.

        Raises:
            UserError: if ``--uniform_shapes`` is set and the pruned layers do not fit a stock checkpoint, or whole
                experts cannot be removed.
        """
        if not any(plans):
            logger.warning("nothing to prune: all ratios are 0; set --sparsity, or --non_uniform with --max_sparsity")
        masks = [self.settings.size_mask(shape, plan) for shape, plan in zip(self.shapes, plans, strict=True)]
        if self._config.uniform_shapes:
            stock_config(self._host.model.config, self._host.family, masks)
        if self._config.whole_experts:
            self._log_experts(masks)
        self._alignment.warn_of_unaligned(masks, self.settings)
        if self.target.dense:
            dense, requested = self.target.dense, self.target.dense - self.target.budget
            size = dense - self.target.removed(self.target.counts(plans))
            logger.info("target: %s", share_text(self.target.describe(size), size, requested, dense))
        return masks

    def _log_experts(self, masks: list[LayerMask]) -> None:
        """Log the experts that stay, the share of the block weights that goes with the others, and a smaller top k.

        Raises:
            UserError: if the router cannot choose among the experts.
        """
        config, family = self._host.model.config, self._host.family
        kept, total = next((len(m.kept_experts), m.shape.num_experts) for m in masks if m.shape.num_experts)
        groups, router = family.num_expert_groups(config), f"--expert_unit expert: the router of {family.base_type}"
        if kept % groups:
            raise UserError(
                f"{router} chooses among {groups} groups of as many experts, {kept} would be left; change --multiple_of"
            )
        if kept < family.fewest_experts * groups:
            of_groups = f" in each of its {groups} groups" if groups > 1 else ""
            raise UserError(
                f"{router} needs {family.fewest_experts} experts{of_groups}, {kept // groups} would be left; lower "
                "--sparsity or the target"
            )
        sparsity = self._config.sparsity
        requested = total - units_to_remove(total, sparsity)
        if requested != kept and not self._config.has_target:
            message = "--sparsity %g leaves %d experts, rounded to %d, a multiple of %d"
            logger.info(message, sparsity, requested, kept, self._alignment.columns_multiple)
        share = removed_share(self._host.layers, family, masks)
        as_many = f", as many in each of {groups} groups" if groups > 1 else ""
        message = "every MoE layer keeps %d of %d experts%s: %.2f %% of the block weights are removed"
        logger.info(message, kept, total, as_many, 100 * share)
        active, reduced = getattr(config, family.active_experts_key), active_experts(config, family, kept)
        if reduced != active:
            logger.warning("%s is reduced from %s to %s", family.active_experts_key, active, reduced)

    def latency(self, plans: list[LayerPlan]) -> dict[str, Any] | None:
        """Return the requested and predicted seconds of ``--target_latency``; ``None`` without it."""
        return self.target.record(plans) if isinstance(self.target, LatencyTarget) else None

    def _scaled_plans(self, units: list[LayerUnits], budget: float) -> list[LayerPlan]:
        """Return the plans of the schedule of ``--allocation`` scaled to ``budget``."""
        counts = scaled_counts(self._schedule, units, budget, self._alignment.uniform)
        return self._aligned([layer.plan(*pair) for layer, pair in zip(units, counts, strict=True)])

    def _plans_of_least_loss(self, sensitivities: dict[int, LayerSensitivity]) -> list[LayerPlan]:
        """Return the plans of least loss that meet the target with the measured layers."""

        def allocate(units: list[LayerUnits], budget: float) -> list[LayerPlan]:
            counts = allocate_with_depth_decay(loss_curves(sensitivities, units), budget)
            return self._aligned(plans_of_counts(dict(zip(sorted(sensitivities), counts, strict=True)), units))

        return self.target.plans_by(allocate)

    def _refined(self, sensitivities: dict[int, LayerSensitivity], plans: list[LayerPlan]) -> Allocate:
        """Return the allocation near ``plans``, which the sensitivities were measured around."""
        multiples = [self._alignment.multiples(layer) for layer in self.units]
        return lambda units, budget: self._aligned(refined_plans(sensitivities, units, plans, budget, multiples))

    def _aligned(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        counts = [unit.counts(plan) for unit, plan in zip(self.units, plans, strict=True)]
        return self._alignment.aligned(plans, self.units, [(heads > 0, columns > 0) for heads, columns in counts])

    def _schedule(self, highest: float) -> list[float]:
        """Return the ratios of all layers by the schedule of ``--allocation`` for a highest ratio."""
        config = self._config
        if config.allocation in (None, "uniform"):
            ratios = [highest] * len(self.layers)
        else:
            lowest = min(config.min_sparsity, highest)
            ratios = non_uniform_ratios(config.allocation, lowest, highest, len(self.layers))
        return layer_ratios(self.layers, len(self.shapes), ratios)

    def _ratios(self) -> list[float]:
        """Return the ratios of all layers by the flags of the original."""
        config = self._config
        if config.non_uniform:
            strategy, count = config.non_uniform_strategy, len(self.layers)
            ratios = non_uniform_ratios(strategy, config.min_sparsity, config.max_sparsity, count)
        else:
            ratios = [config.sparsity] * len(self.layers)
        return layer_ratios(self.layers, len(self.shapes), ratios)


def ratio_plans(
    ratios: Sequence[float], units: list[LayerUnits], alignment: Alignment | None = None
) -> list[LayerPlan]:
    """Return aligned plans that remove ``round(units · ratio)`` heads and columns of every layer.

    Args:
        ratios: ratio of every layer; layers of ratio 0 stay dense.
        units: units of every layer.
        alignment: multiples to keep (default: those that experts need).
    """
    plans = [layer.plan(*layer.removed_by(ratio)) for layer, ratio in zip(units, ratios, strict=True)]
    # Layers whose small ratio rounds to zero units are aligned too.
    return (alignment or Alignment()).aligned(plans, units, [(ratio > 0, ratio > 0) for ratio in ratios])


def plans_of(
    model: PreTrainedModel, ratios: Sequence[float], settings: PruningSettings, alignment: Alignment | None = None
) -> list[LayerPlan]:
    """Return :func:`ratio_plans` of the layers of ``model``."""
    family = find_family(model.config)
    units = layer_units(family.decoder_layers(model), family, layer_shapes(model.config), settings)
    return ratio_plans(ratios, units, alignment)


def has_experts(shapes: list[LayerShape]) -> bool:
    """Return whether any layer is a mixture of experts."""
    return any(shape.num_experts for shape in shapes)
