"""One planner for every way to say how much of each layer is removed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from slim_utils.allocation.alignment import Alignment
from slim_utils.allocation.budget import (
    LayerUnits,
    allocate_in_depth,
    block_weights,
    layer_units,
    plans_of_counts,
    read_profile,
    scaled_counts,
)
from slim_utils.allocation.refinement import measure_around, refined_plans
from slim_utils.allocation.schedules import layer_range, layer_ratios, non_uniform_ratios
from slim_utils.allocation.sensitivity import UnitSensitivity, loss_curves, measure, most_removable
from slim_utils.common.errors import UserError
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.obs import SelectionOptions
from slim_utils.params_remove import stock_config
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.pruning_config import SENSITIVITY, PruningConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def no_file(refinement: int) -> Path | None:
    """Keeps no measurements."""
    return None


def pruning_settings(config: PruningConfig) -> PruningSettings:
    """How layers are pruned; the devices of ``config`` are resolved."""
    return PruningSettings(
        device=config.torch_device,
        cache_dev=config.torch_cache_dev,
        batch_samples=config.batch_samples,
        percdamp=config.percdamp,
        compensate=not config.no_compensate,
        selection=SelectionOptions(config.exact_heads, config.column_group or 0),
        gqa_unit=config.gqa_unit,
    )


def alignment(config: PruningConfig) -> Alignment:
    """Multiples that layers keep."""
    return Alignment(
        heads_multiple=math.lcm(2 if config.even_heads else 1, config.tp_size),
        columns_multiple=math.lcm(config.multiple_of, config.tp_size),
        tp_size=config.tp_size,
        uniform=config.uniform_shapes,
    )


@dataclass
class Measured:
    """What the sensitivity analysis and the last round of refinement found, by layer; empty where there was none.

    Attributes:
        sensitivity: of the dense model.
        refinement: of the pruned model.
    """

    sensitivity: dict[int, list[UnitSensitivity]] = field(default_factory=dict)
    refinement: dict[int, list[UnitSensitivity]] = field(default_factory=dict)


class Planner:
    """Plans of all layers of a model.

    Args:
        config: of the run.
        host: of the model; its weights, which may be on the meta device, matter to :meth:`measured` alone.

    Attributes:
        settings: how layers are pruned.
        shapes: of every layer.
    """

    def __init__(self, config: PruningConfig, host: ResidentModel) -> None:
        self._config, self._host = config, host
        self._alignment = alignment(config)
        self.settings = pruning_settings(config)
        self.shapes: list[LayerShape] = layer_shapes(host.model.config)

    @cached_property
    def units(self) -> list[LayerUnits]:
        """Units of every layer."""
        return layer_units(self._host.layers, self._host.family, self.shapes, self.settings)

    @cached_property
    def layers(self) -> range:
        """Layers that may be pruned."""
        return layer_range(self._config.minlayer, self._config.maxlayer, len(self.shapes))

    @cached_property
    def budget(self) -> float:
        """Block weights that the target asks to remove.

        Raises:
            UserError: if the model is smaller than the target.
        """
        if self._config.target_params is None:
            return (self._config.target_ratio or 0) * block_weights(self._host.layers, self._host.family, self.shapes)
        parameters = count_parameters(self._host.model)
        budget = parameters - self._config.target_params
        if budget <= 0 or self._config.target_params <= 0:
            raise UserError(f"--target_params {self._config.target_params:g}: the model has {parameters}")
        return budget

    def plans(self) -> list[LayerPlan]:
        """Plans without any measurement: of the ratios, of a schedule for the target, or of another run's profile.

        Raises:
            UserError: if the target cannot be met.
        """
        if self._config.profile:
            return self._aligned(read_profile(self._config.profile, self.units, self.shapes))
        if self._config.has_target:
            counts = scaled_counts(self._schedule, self.units, self.budget, self._config.uniform_shapes)
            return self._aligned([own.plan(*count) for own, count in zip(self.units, counts, strict=True)])
        return ratio_plans(self._ratios(), self.units, self._alignment)

    def check_measurable(self) -> None:
        """Make sure, before anything is measured, that the allocation can be measured and can meet the target.

        Raises:
            UserError: if it cannot.
        """
        if has_experts(self.shapes):
            flag = self._config.measuring_flag
            raise UserError(f"{flag} is not supported for MoE models; use --allocation log_increase alone")
        most = most_removable(self.units, self.layers)
        if self._config.allocation != SENSITIVITY:
            self.plans()
        if most < self.budget:
            raise UserError(f"no more than {most} block weights can go, of {self.budget:.0f}; lower the target")

    def measured(
        self, samples: Tensor, starts: Tensor | None, kept: Callable[[int], Path | None] = no_file
    ) -> tuple[list[LayerPlan], Measured]:
        """Plans by what pruning costs where, and what was measured.

        The dense model ends as it was.

        Args:
            samples: (num_samples, seqlen) calibration token ids.
            starts: (count, 8) sink windows; ``None`` for none.
            kept: file that keeps the measurements of a round of refinement, or of the sensitivity analysis (0), for a
                run that is cut off.

        Raises:
            UserError: if predictions are not finite, or the target cannot be met.
        """
        minutes, measured = self._config.search_minutes, Measured()
        seconds = math.inf if minutes is None else 60 * minutes
        if self._config.allocation == SENSITIVITY:
            measured.sensitivity = measure(self._host, samples, self.layers, self.settings, kept(0), seconds)
            plans = self._of_least_loss(measured.sensitivity)
        else:
            plans = self.plans()
        for number in range(1, self._config.refine + 1):
            file = kept(number)
            measured.refinement = measure_around(self._host, samples, starts, plans, self.settings, file, seconds)
            plans = self._aligned(refined_plans(measured.refinement, self.units, plans, self.budget))
        return plans, measured

    def size_masks(self, plans: list[LayerPlan]) -> list[LayerMask]:
        """Masks of the sizes that ``plans`` lead to; logs what a user may not expect of them.

        Raises:
            UserError: if a stock checkpoint is asked for and cannot have these shapes.
        """
        if not any(plans):
            logger.warning("nothing to prune: all ratios are 0; set --sparsity, or --non_uniform with --max_sparsity")
        masks = [self.settings.size_mask(shape, plan) for shape, plan in zip(self.shapes, plans, strict=True)]
        if self._config.uniform_shapes:
            stock_config(self._host.model.config, self._host.family, masks)
        self._alignment.warn_of_unaligned(masks, self.settings)
        return masks

    def _of_least_loss(self, sensitivity: dict[int, list[UnitSensitivity]]) -> list[LayerPlan]:
        """Plans of the least loss, of those layers that were measured, that remove the budget."""
        counts = allocate_in_depth(loss_curves(sensitivity, self.units), self.budget)
        return self._aligned(plans_of_counts(dict(zip(sorted(sensitivity), counts, strict=True)), self.units))

    def _aligned(self, plans: list[LayerPlan]) -> list[LayerPlan]:
        return self._alignment.aligned(plans, self.units, [(plan.heads > 0, plan.columns > 0) for plan in plans])

    def _schedule(self, highest: float) -> list[float]:
        """Ratios of all layers by the schedule of ``--allocation``, the highest given."""
        config = self._config
        if config.allocation in (None, "uniform"):
            ratios = [highest] * len(self.layers)
        else:
            lowest = min(config.min_sparsity, highest)
            ratios = non_uniform_ratios(config.allocation, lowest, highest, len(self.layers))
        return layer_ratios(self.layers, len(self.shapes), ratios)

    def _ratios(self) -> list[float]:
        """Ratios of all layers by the original's flags."""
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
    """Plans that remove ``round(units · ratio)`` heads and columns of every layer, aligned.

    Args:
        ratios: of every layer; a layer of ratio 0 is left alone.
        units: of every layer.
        alignment: multiples to keep (default: what experts need).
    """
    plans = [own.plan(*own.removed_by(ratio)) for own, ratio in zip(units, ratios, strict=True)]
    # A layer whose small ratio rounds to no unit is aligned too.
    return (alignment or Alignment()).aligned(plans, units, [(ratio > 0, ratio > 0) for ratio in ratios])


def plans_of(
    model: PreTrainedModel, ratios: Sequence[float], settings: PruningSettings, alignment: Alignment | None = None
) -> list[LayerPlan]:
    """:func:`ratio_plans` of the layers of ``model``."""
    family = find_family(model.config)
    units = layer_units(family.decoder_layers(model), family, layer_shapes(model.config), settings)
    return ratio_plans(ratios, units, alignment)


def has_experts(shapes: list[LayerShape]) -> bool:
    """Whether a layer is a mixture of experts."""
    return any(shape.num_experts for shape in shapes)
