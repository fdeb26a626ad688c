"""Structured OBS pruning of one linear map: the SlimGPT solver, independent of any model.

For a linear map ``W`` (out × in) and calibration inputs ``x``, ``H = (2/n) Σ x xᵀ``. Pruning the input columns ``S``
with the optimal compensation costs ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` and leaves ``W − W_S (H⁻¹_SS)⁻¹ H⁻¹_S,:`` (Ling et al.,
SlimGPT, NeurIPS 2024; Hassibi & Stork, Optimal Brain Surgeon).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slim_utils.common.errors import UserError
from slim_utils.common.memory import full_gpu_as_out_of_memory
from slim_utils.obs import (
    GRAM_BLOCK,
    PAPER_SELECTION,
    Removal,
    SelectionOptions,
    add_gram,
    damping_steps,
    greedy_obs,
    invert_in_place,
    output_energy,
    symmetrise_upper,
    unit_columns,
)

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
# Output rows whose error is computed from the Hessian itself, to check a solve.
CHECKED_ROWS = 64
# What a solve in fp32 may differ by: ``H H⁻¹ z`` from ``z``, and the error of the weights from the sum of the costs.
FP32_RESIDUAL, FP32_EXCESS = 0.05, 0.01


@dataclass(frozen=True)
class PruneResult:
    """What :meth:`SlimGPT.struct_prune` did.

    Attributes:
        pruned_units: ascending indices of the pruned units (heads, kv groups or columns).
        kept_units: ascending indices of the others.
        error_uncompensated: ``tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`` if the columns were zeroed without compensation.
        error_compensated: the same for the pruned weights.
        percdamp: damping used; above the requested one where the Hessian was not positive-definite.
        solve_dtype: precision of the solve, ``float64`` or ``float32``; empty where nothing was solved.
        solve_device: device of the solve.
    """

    pruned_units: list[int]
    kept_units: list[int]
    error_uncompensated: float
    error_compensated: float
    percdamp: float
    solve_dtype: str = ""
    solve_device: str = ""


@dataclass(frozen=True)
class _Target:
    """What :func:`slim_utils.obs.greedy_obs` is to prune."""

    count: int
    unit_size: int
    compensate: bool
    num_groups: int
    selection: SelectionOptions


@dataclass(frozen=True)
class _Inverse:
    """``(H + λI)⁻¹``.

    Attributes:
        matrix: (in, in) in the dtype and on the device of the solve.
        percdamp: λ as a share of the mean of H's diagonal.
        damping: λ.
    """

    matrix: Tensor
    percdamp: float
    damping: float


@dataclass(frozen=True)
class _Solution:
    """Pruned weights (out, in) in the dtype of the solve, with what led to them."""

    weight: Tensor
    removal: Removal
    inverse: _Inverse


class SlimGPT:
    """Accumulates the Hessian of one ``nn.Linear`` and prunes input columns of it, whole units at a time.

    Args:
        linear: the map to prune; its weight (out × in, any floating dtype, any device) is changed in place.
        name: its name in messages.
    """

    def __init__(self, linear: nn.Linear, name: str = "linear") -> None:
        self.linear = linear
        self.name = name
        self.columns = linear.in_features
        self.num_samples = 0
        # The upper triangle of Σ x xᵀ until the Hessian is read.
        self._gram: Tensor | None = torch.zeros(
            self.columns, self.columns, dtype=torch.float32, device=linear.weight.device
        )
        self._hessian: Tensor | None = None
        self._inverse: _Inverse | None = None
        # Device, dtype and damping that a request was solved with, by its damping and dtype.
        self._solved: dict[tuple[float, torch.dtype], tuple[torch.device, torch.dtype, float]] = {}

    @property
    def hessian(self) -> Tensor:
        """``(2/n) Σ x xᵀ`` (in, in) of all batches, n counting samples, in fp32; zero without samples."""
        if self._hessian is None:
            self._hessian = symmetrise_upper(self._upper_gram().mul_(2 / max(self.num_samples, 1)))
            self._gram = None
        return self._hessian

    @hessian.setter
    def hessian(self, hessian: Tensor) -> None:
        self._hessian, self._gram, self._inverse = hessian, None, None
        self._solved.clear()

    def _upper_gram(self) -> Tensor:
        if self._gram is None:
            raise RuntimeError(f"{self.name}: the Hessian was read; no batch can be added")
        return self._gram

    def add_batch(self, inputs: Tensor) -> None:
        """Add the outer products of a batch of inputs to the Hessian, in fp32; not after it was read.

        Args:
            inputs: (samples, tokens, in) or (tokens, in; counted as one sample), any floating dtype.
        """
        if inputs.dim() == 2:
            inputs = inputs.unsqueeze(0)
        add_gram(self._upper_gram(), inputs.reshape(-1, self.columns))
        self.num_samples += inputs.shape[0]

    def all_reduce_hessian(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum the Hessian over all processes; ``all_reduce`` sums a tensor in place."""
        gram = self._upper_gram()
        count = torch.tensor(float(self.num_samples), device=gram.device)
        all_reduce(gram)
        all_reduce(count)
        self.num_samples = int(count.item())

    @torch.no_grad()
    def struct_prune(
        self,
        count: int,
        unit_size: int = 1,
        percdamp: float = 0.01,
        compensate: bool = True,
        num_groups: int = 1,
        selection: SelectionOptions = PAPER_SELECTION,
        solve_dtype: torch.dtype = torch.float64,
    ) -> PruneResult:
        """Zero ``count`` units of columns and compensate for them in the others.

        Columns are pruned in groups, larger units (a head, a kv group) one at a time, and scores are updated after each
        step. The damping is raised tenfold while the Hessian is not positive-definite. A solve in fp32 is checked, and
        repeated in fp64 on the CPU if it fails, and so is one that runs out of device memory. Columns with all-zero
        inputs count as zero, as in the original, but those of kept units keep their weights. With no unit to prune
        nothing is solved.

        Args:
            count: units to prune, the same number from every group and never all of one.
            unit_size: adjacent columns of a unit: 1, ``head_dim``, or ``head_dim`` · heads of a kv group.
            percdamp: damping added to the diagonal of the Hessian, as a share of its mean.
            compensate: whether the remaining weights are updated.
            num_groups: groups of units, side by side, that lose the same number each.
            selection: how units are selected.
            solve_dtype: ``torch.float64``, or ``torch.float32`` for devices with slow fp64.

        Raises:
            UserError: if activations are not finite, or the Hessian is not positive-definite at any damping.
            ValueError: if ``count`` is not the same number from every group, or all of one.
        """
        num_units = self.columns // unit_size
        self._check(count, num_units, num_groups)
        if not count:
            return PruneResult([], list(range(num_units)), 0.0, 0.0, percdamp)
        solution = self._solve(_Target(count, unit_size, compensate, num_groups, selection), percdamp, solve_dtype)
        inverse, pruned = solution.inverse, sorted(solution.removal.units.tolist())
        columns = unit_columns(torch.tensor(pruned, device=self.hessian.device), unit_size)
        error_uncompensated, error_compensated = self._relative_errors(solution, columns, compensate)
        kept_dead = self.hessian.diagonal() == 0
        kept_dead[columns] = False
        kept_dead = kept_dead.to(solution.weight.device)
        solution.weight[:, kept_dead] = self.linear.weight.to(solution.weight.device)[:, kept_dead].to(inverse.matrix)
        self.linear.weight.copy_(solution.weight)
        return PruneResult(
            pruned_units=pruned,
            kept_units=sorted(set(range(num_units)) - set(pruned)),
            error_uncompensated=error_uncompensated,
            error_compensated=error_compensated,
            percdamp=inverse.percdamp,
            solve_dtype=str(inverse.matrix.dtype).removeprefix("torch."),
            solve_device=str(inverse.matrix.device),
        )

    @torch.no_grad()
    def error_curve(
        self,
        count: int,
        unit_size: int = 1,
        percdamp: float = 0.01,
        num_groups: int = 1,
        selection: SelectionOptions = PAPER_SELECTION,
        solve_dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Errors ``tr(ΔW H ΔWᵀ)`` of pruning 0, 1, … ``count`` units; the weights stay unchanged.

        Args:
            count: largest number of units.
            unit_size: as for :meth:`struct_prune`, like the others.
            percdamp: damping of the Hessian, which is part of the errors.
            num_groups: groups of units; each loses one at a time.
            selection: how units are selected; the cost of a step is spread evenly over its units.
            solve_dtype: precision.

        Returns:
            (n + 1,) fp64 on the CPU; entry i is the error of pruning i units of every group.

        Raises:
            UserError: as :meth:`struct_prune`.
        """
        self._check(count, self.columns // unit_size, num_groups)
        if not count:
            return torch.zeros(1, dtype=torch.float64)
        removal = self._solve(_Target(count, unit_size, True, num_groups, selection), percdamp, solve_dtype).removal
        steps = torch.tensor(removal.steps, dtype=torch.long)
        each = (removal.costs.cpu().double() / steps).repeat_interleave(steps)
        return torch.cat([torch.zeros(1, dtype=torch.float64), each.cumsum(0)])[::num_groups]

    def _check(self, count: int, num_units: int, num_groups: int) -> None:
        if count % num_groups or not 0 <= count <= num_units - num_groups:
            raise ValueError(f"{count} units of {num_units} in {num_groups} groups")
        if not torch.isfinite(self.hessian.diagonal()).all():
            raise UserError(f"{self.name}: non-finite activations; try --dtype bfloat16 or float32")

    def _solve(self, target: _Target, percdamp: float, dtype: torch.dtype) -> _Solution:
        """The first sound solution: on the Hessian's device or, where its memory is too small, on the CPU.

        A request that needed another device, dtype or damping once begins with those the next time.
        """
        request = percdamp, dtype
        device, dtype, percdamp = self._solved.get(request, (self.hessian.device, dtype, percdamp))
        solution = self._solve_or_offload(device, target, percdamp, dtype)
        matrix = solution.inverse.matrix
        self._solved[request] = matrix.device, matrix.dtype, solution.inverse.percdamp
        return solution

    def _solve_or_offload(
        self, device: torch.device, target: _Target, percdamp: float, dtype: torch.dtype
    ) -> _Solution:
        try:
            with full_gpu_as_out_of_memory():
                return self._solve_on(device, target, percdamp, dtype)
        except torch.OutOfMemoryError:
            if device == CPU:
                raise
        # Outside of the handler, whose traceback keeps the tensors of the failed solve alive.
        self._inverse = None
        torch.cuda.empty_cache()
        logger.warning("%s: out of device memory; solving in fp64 on the CPU", self.name)
        return self._solve_on(CPU, target, percdamp, torch.float64)

    def _solve_on(self, device: torch.device, target: _Target, percdamp: float, dtype: torch.dtype) -> _Solution:
        if dtype == torch.float32:
            solution = self._attempt(device, dtype, percdamp, target)
            if solution:
                return solution
            device = CPU
            logger.warning("%s: ill-conditioned in fp32; solving in fp64 on the CPU", self.name)
        for raised in damping_steps(percdamp):
            solution = self._attempt(device, torch.float64, raised, target)
            if solution:
                if raised != percdamp:
                    message = "%s: Hessian not positive-definite at percdamp %g; raised to %g"
                    logger.warning(message, self.name, percdamp, raised)
                return solution
        raise UserError(f"{self.name}: Hessian not positive-definite at any damping; raise --num_samples or --percdamp")

    def _attempt(self, device: torch.device, dtype: torch.dtype, percdamp: float, target: _Target) -> _Solution | None:
        """The solution at one damping, ``None`` where the Hessian is not positive-definite or it fails the check."""
        inverse = self._inverted(device, dtype, percdamp)
        if inverse is None:
            return None
        W = self.linear.weight.to(device, dtype, copy=True)
        W[:, (self.hessian.diagonal() == 0).to(device)] = 0
        rows = torch.arange(0, len(W), math.ceil(len(W) / CHECKED_ROWS), device=device)
        dense = W[rows]
        removal = greedy_obs(
            W,
            inverse.matrix,
            target.count,
            target.unit_size,
            target.compensate,
            target.num_groups,
            target.selection,
        )
        if removal is None:
            return None
        solution = _Solution(W, removal, inverse)
        columns = unit_columns(removal.units, target.unit_size)
        return solution if self._is_sound(solution, dense, rows, columns, target.compensate) else None

    def _inverted(self, device: torch.device, dtype: torch.dtype, percdamp: float) -> _Inverse | None:
        """``(H + λI)⁻¹``, kept for the next solve with the same Hessian; ``None`` where it cannot be trusted."""
        kept = self._inverse
        if kept and (kept.matrix.device, kept.matrix.dtype, kept.percdamp) == (device, dtype, percdamp):
            return kept
        self._inverse = None
        H = self.hessian.to(device, dtype, copy=True)
        diagonal = H.diagonal()
        diagonal[diagonal == 0] = 1
        damping = percdamp * diagonal.mean().item()
        diagonal += damping
        if not invert_in_place(H) or (dtype == torch.float32 and self._residual(H, damping) > FP32_RESIDUAL):
            return None
        self._inverse = _Inverse(H, percdamp, damping)
        return self._inverse

    def _residual(self, Hinv: Tensor, damping: float) -> float:
        """Relative difference of ``(H + λI) H⁻¹ z`` from random ``z`` of live columns."""
        live = (self.hessian.diagonal() != 0).to(Hinv.device)
        z = torch.randn(len(Hinv), 4, generator=torch.Generator().manual_seed(0)).to(Hinv) * live[:, None]
        solved = Hinv @ z
        product = (self.hessian @ solved.to(self.hessian)).to(Hinv) + damping * solved
        return ((product - z).norm() / z.norm().clamp_min(1)).item()

    def _is_sound(self, solution: _Solution, dense: Tensor, rows: Tensor, columns: Tensor, compensate: bool) -> bool:
        """Whether the error of some output rows, by the Hessian itself, is what exact arithmetic would leave.

        Compensation never ends worse than zeroing; where it does, the solve was too ill-conditioned. In fp32 the error
        also has to be the sum of the costs.

        Args:
            solution: to check.
            dense: (rows, in) their weights before.
            rows: indices.
            columns: indices of pruned columns.
            compensate: whether there was compensation.
        """
        if not compensate:
            return True
        change, zeroing = dense - solution.weight[rows], torch.zeros_like(dense)
        zeroing[:, columns] = dense[:, columns]
        damping = solution.inverse.damping
        compensated, uncompensated = (self._quadratic(delta) for delta in (change, zeroing))
        tolerance = 1e-12 * self._quadratic(dense)
        if not compensated <= uncompensated * (1 + 1e-4) + tolerance:
            return False
        if solution.weight.dtype == torch.float64:
            return True
        damped = compensated + damping * change.double().square().sum().item()
        cost = solution.removal.row_costs[rows].double().sum().item()
        return abs(damped - cost) <= cost * FP32_EXCESS + tolerance

    def _quadratic(self, rows: Tensor) -> float:
        """``tr(R H Rᵀ)`` of a few rows (n, in), in fp64, whose rounding alone can turn a small one negative."""
        rows, total = rows.double(), torch.zeros((), dtype=torch.float64, device=rows.device)
        for start in range(0, self.columns, GRAM_BLOCK):
            block = self.hessian[start : start + GRAM_BLOCK].to(rows)
            total += ((rows[:, start : start + GRAM_BLOCK] @ block) * rows).sum()
        return max(total.item(), 0.0)

    def _relative_errors(self, solution: _Solution, columns: Tensor, compensate: bool) -> tuple[float, float]:
        """Output error, as a share of the output's energy, of zeroing ``columns`` alone and of the ``solution``.

        With compensation the costs add up to the error under the damped Hessian.
        """
        H, W = self.hessian, self.linear.weight
        energy = max(output_energy(W, H), torch.finfo(H.dtype).tiny)
        removed = W[:, columns].to(H.dtype)
        uncompensated = max(((removed @ H[columns[:, None], columns]) * removed).sum().item(), 0.0) / energy
        if not compensate:
            return uncompensated, uncompensated
        live, change = H.diagonal() != 0, torch.zeros((), dtype=torch.float64, device=W.device)
        for dense, pruned in zip(W.split(GRAM_BLOCK), solution.weight.split(GRAM_BLOCK), strict=True):
            change += (dense * live - pruned.to(W.device)).square().sum()
        error = solution.removal.costs.double().sum().item() - solution.inverse.damping * change.item()
        return uncompensated, max(error, 0.0) / energy

    def release(self) -> None:
        """Free the Hessian."""
        self._gram = self._hessian = self._inverse = None
