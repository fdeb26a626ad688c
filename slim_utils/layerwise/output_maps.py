"""Output maps with their Hessians: those that lose units together are pruned and measured as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slim_utils.layerwise.settings import PruningSettings
from slim_utils.slimgpt import PruneResult, SlimGPT


@dataclass(frozen=True)
class UnitMap:
    """One of several maps that lose units together.

    Attributes:
        pruner: with the Hessian.
        per_unit: units of this map that go with one of the others.
        least_percdamp: damping that it needs at least.
    """

    pruner: SlimGPT
    per_unit: int = 1
    least_percdamp: float = 0.0

    def percdamp(self, settings: PruningSettings) -> float:
        """Return the damping."""
        return max(settings.percdamp, self.least_percdamp)


@dataclass(frozen=True)
class OutputMaps:
    """Output maps that lose the same number of units: a single one, or those of all experts and of a shared expert.

    Attributes:
        name: of the module in messages and records.
        maps: the maps.
        parameters: the tensors that hold their weights.
        unit_size: columns of a unit.
        num_groups: groups of units; each loses the same number.
    """

    name: str
    maps: Sequence[UnitMap]
    parameters: Sequence[Tensor]
    unit_size: int = 1
    num_groups: int = 1

    @property
    def units_per_group(self) -> int:
        """Units of a group of each map."""
        return self.maps[0].pruner.columns // self.unit_size // self.num_groups

    def prune(self, count: int, settings: PruningSettings) -> list[PruneResult]:
        """Prune ``count`` units of every group, in place; returns the result of every map."""
        return [
            settings.struct_prune(
                unit_map.pruner,
                count * unit_map.per_unit * self.num_groups,
                self.unit_size,
                self.num_groups,
                unit_map.percdamp(settings),
            )
            for unit_map in self.maps
        ]

    def error_curve(self, most: int, settings: PruningSettings, steps: int) -> Tensor:
        """Return the errors of pruning 0, 1, … ``most`` units of every group; the weights stay unchanged.

        The error is the sum over the maps, of all their tokens, as a mean over the samples.

        Args:
            most: largest number of units.
            settings: how layers are pruned.
            steps: steps of a curve of columns, unless a column group is set.

        Returns:
            (most + 1,) fp64 on the CPU.
        """
        total, num_samples = torch.zeros(most + 1, dtype=torch.float64), 0
        for unit_map in self.maps:
            pruner = unit_map.pruner
            if not pruner.num_samples:
                # An expert without tokens.
                continue
            group = settings.selection.column_group or math.ceil(pruner.columns / steps)
            errors = pruner.error_curve(
                most * unit_map.per_unit * self.num_groups,
                self.unit_size,
                unit_map.percdamp(settings),
                self.num_groups,
                replace(settings.selection, column_group=group),
                settings.solve_dtype,
            )
            total += errors[:: unit_map.per_unit] * pruner.num_samples
            num_samples += pruner.num_samples
        return total / num_samples

    def copies(self, device: torch.device | str | None = None) -> list[Tensor]:
        """Return copies of the weights, on ``device`` if given."""
        return [parameter.to(device or parameter.device, copy=True) for parameter in self.parameters]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Replace the weights by ``copies``."""
        restore_parameters(self.parameters, copies)

    def release(self) -> None:
        """Free the Hessians."""
        for unit_map in self.maps:
            unit_map.pruner.release()


def restore_parameters(parameters: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Replace the values of ``parameters`` by those of ``copies``."""
    for parameter, copied in zip(parameters, copies, strict=True):
        parameter.copy_(copied)
