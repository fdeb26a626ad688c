"""OBS pruning of one linear map: the maths of SlimGPT, knowing nothing of models.

For a linear map ``W`` (out × in) and calibration inputs ``x``, ``H = (2/n) Σ x xᵀ``. Removing the input columns ``S``
with the optimal change of what remains costs ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` and leaves
``W − W_S (H⁻¹_SS)⁻¹ H⁻¹_S,:`` (Ling et al., SlimGPT, NeurIPS 2024; Hassibi & Stork, Optimal Brain Surgeon).
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slim_utils.common.errors import UserError
from slim_utils.obs import PAPER_SELECTION, Removal, SelectionOptions, damping_steps, greedy_obs, unit_columns

logger = logging.getLogger(__name__)

SOLVE_DTYPE = torch.float64
# Blocks of a Gram matrix that only its upper ones are computed of: so many a row, none narrower than this.
GRAM_BLOCKS, GRAM_BLOCK = 8, 256


@dataclass(frozen=True)
class PruneResult:
    """What :meth:`SlimGPT.struct_prune` did.

    Attributes:
        pruned_units: ascending indices of the units (heads, kv groups or columns) that were removed.
        kept_units: ascending indices of the others.
        error_uncompensated: ``tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`` had the columns been zeroed without compensation.
        error_compensated: the same for the weights as they now are.
        percdamp: damping used; larger than asked where the Hessian was not positive-definite.
    """

    pruned_units: list[int]
    kept_units: list[int]
    error_uncompensated: float
    error_compensated: float
    percdamp: float


class SlimGPT:
    """Accumulates the Hessian of one ``nn.Linear`` and removes input columns of it, whole units at a time.

    Args:
        linear: the map to prune; its weight (out × in, any floating dtype, any device) is changed in place.
        name: what messages call it.
    """

    def __init__(self, linear: nn.Linear, name: str = "linear") -> None:
        self.linear = linear
        self.name = name
        self.columns = linear.in_features
        self.num_samples = 0
        # The upper triangle of Σ x xᵀ, and what was made of it.
        self._gram: Tensor | None = torch.zeros(
            self.columns, self.columns, dtype=torch.float32, device=linear.weight.device
        )
        self._hessian: Tensor | None = None

    @property
    def hessian(self) -> Tensor:
        """``(2/n) Σ x xᵀ`` (in, in) of all batches, n counting samples, in fp32; zero where there were none."""
        if self._hessian is None:
            upper = self._upper_gram().triu_().mul_(2 / max(self.num_samples, 1))
            self._hessian = upper + upper.triu(1).T
            self._gram = None
        return self._hessian

    @hessian.setter
    def hessian(self, hessian: Tensor) -> None:
        self._hessian, self._gram = hessian, None

    def _upper_gram(self) -> Tensor:
        if self._gram is None:
            raise RuntimeError(f"{self.name}: the Hessian is settled; no batch can be added")
        return self._gram

    def add_batch(self, inputs: Tensor) -> None:
        """Add the outer products of a batch of inputs to the Hessian, in fp32; not after it was looked at.

        Args:
            inputs: (samples, tokens, in) or (tokens, in; counted as one sample), any floating dtype.
        """
        if inputs.dim() == 2:
            inputs = inputs.unsqueeze(0)
        add_gram(self._upper_gram(), inputs.reshape(-1, self.columns))
        self.num_samples += inputs.shape[0]

    def all_reduce_hessian(self, add: Callable[[Tensor], None]) -> None:
        """Add what others have seen to what this one has, by ``add``, which sums a tensor in place over all of them."""
        gram = self._upper_gram()
        count = torch.tensor(float(self.num_samples), device=gram.device)
        add(gram)
        add(count)
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
    ) -> PruneResult:
        """Zero ``count`` units of columns and compensate in the others.

        A unit of one column goes in groups, a larger one (a head, a kv group) alone; after each, the scores are taken
        anew. Where the Hessian is not positive-definite the damping is raised tenfold until it is. Columns whose inputs
        were all zero count as zero, as in the original, but those of kept units keep their weights; with no unit to
        remove nothing is solved, and the weights stay as they are.

        Args:
            count: units to remove, equally many of every group and never all of one.
            unit_size: columns of a unit, side by side: 1, ``head_dim``, or ``head_dim`` · heads of a kv group.
            percdamp: damping added to the diagonal of the Hessian, as a share of its mean.
            compensate: whether the remaining weights take over what was removed.
            num_groups: groups of units, side by side, that lose equally many each.
            selection: how units are chosen.

        Raises:
            UserError: if the activations seen were not finite, or no damping helps.
            ValueError: if ``count`` is not equally many of every group, or all of one.
        """
        num_units = self.columns // unit_size
        _check_count(count, num_units, num_groups)
        self._check_finite()
        if not count:
            return PruneResult([], list(range(num_units)), 0.0, 0.0, percdamp)
        attempts = self._attempts(count, unit_size, percdamp, compensate, num_groups, selection)
        for damping, weight, pruned_weight, removal in attempts:
            columns = unit_columns(removal.units, unit_size)
            error_uncompensated, error_compensated = relative_errors(weight, pruned_weight, self.hessian, columns)
            # Exact arithmetic never ends worse than plain zeroing; where it does, the solve was too ill-conditioned.
            if not error_compensated <= error_uncompensated * (1 + 1e-4) + 1e-12:
                continue
            if damping != percdamp:
                logger.warning(
                    "%s: Hessian not positive-definite at percdamp %g; raised to %g", self.name, percdamp, damping
                )
            kept_dead = self.hessian.diagonal() == 0
            kept_dead[columns] = False
            pruned_weight[:, kept_dead] = self.linear.weight[:, kept_dead].to(SOLVE_DTYPE)
            self.linear.weight.copy_(pruned_weight)
            pruned = sorted(removal.units.tolist())
            kept = sorted(set(range(num_units)) - set(pruned))
            return PruneResult(pruned, kept, error_uncompensated, error_compensated, damping)
        raise self._unsolvable()

    @torch.no_grad()
    def error_curve(
        self,
        count: int,
        unit_size: int = 1,
        percdamp: float = 0.01,
        num_groups: int = 1,
        selection: SelectionOptions = PAPER_SELECTION,
    ) -> Tensor:
        """Errors ``tr(ΔW H ΔWᵀ)`` of removing more and more units, up to ``count``; the weights stay as they are.

        Args:
            count: units removed at the end.
            unit_size: as for :meth:`struct_prune`, and so are the others.
            percdamp: damping of the Hessian, which counts in the errors.
            num_groups: groups of units; one of each goes at a time.
            selection: how units are chosen; within a step the cost is dealt out evenly.

        Returns:
            (n + 1,) fp64 on the CPU, from 0 on; entry i is for i units of every group.

        Raises:
            UserError: as :meth:`struct_prune`.
        """
        _check_count(count, self.columns // unit_size, num_groups)
        self._check_finite()
        if not count:
            return torch.zeros(1, dtype=torch.float64)
        for _, _, _, removal in self._attempts(count, unit_size, percdamp, True, num_groups, selection):
            steps = torch.tensor(removal.steps, dtype=torch.long)
            each = (removal.costs.cpu().double() / steps).repeat_interleave(steps)
            errors = torch.cat([torch.zeros(1, dtype=torch.float64), each.cumsum(0)])
            return errors[::num_groups]
        raise self._unsolvable()

    def _attempts(
        self,
        count: int,
        unit_size: int,
        percdamp: float,
        compensate: bool,
        num_groups: int,
        selection: SelectionOptions,
    ) -> Iterator[tuple[float, Tensor, Tensor, Removal]]:
        """Damping, weights before and after, and what was removed, at every damping that makes the Hessian definite."""
        hessian = self.hessian.to(SOLVE_DTYPE, copy=True)
        weight = self.linear.weight.to(SOLVE_DTYPE, copy=True)
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0
        diagonal = hessian.diagonal().clone()
        for damping in damping_steps(percdamp):
            hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
            pruned_weight = weight.clone()
            removal = greedy_obs(pruned_weight, hessian, count, unit_size, compensate, num_groups, selection)
            if removal is not None:
                yield damping, weight, pruned_weight, removal

    def _check_finite(self) -> None:
        if not torch.isfinite(self.hessian).all():
            raise UserError(f"{self.name}: non-finite activations; try --dtype bfloat16 or float32")

    def _unsolvable(self) -> UserError:
        return UserError(
            f"{self.name}: Hessian not positive-definite at any damping; raise --num_samples or --percdamp"
        )

    def release(self) -> None:
        """Let go of the Hessian."""
        self._gram = self._hessian = None


def add_gram(gram: Tensor, tokens: Tensor) -> None:
    """Add ``tokensᵀ tokens`` to the upper triangle of ``gram`` (in, in), in place; what is below it is of no use.

    Rows of blocks from the diagonal on: little more than half the products. Half-precision tokens on a GPU go through
    its tensor cores, whose products of two are exact in fp32; everything else is computed in fp32.
    """
    exact = tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16)
    if not exact:
        tokens = tokens.float()
    columns = tokens.shape[1]
    size = max(GRAM_BLOCK, math.ceil(columns / GRAM_BLOCKS))
    for start in range(0, columns, size):
        rows, rest = tokens[:, start : start + size].T, tokens[:, start:]
        block = gram[start : start + size, start:]
        if exact:
            block.add_(torch.mm(rows, rest, out_dtype=torch.float32))
        else:
            block.addmm_(rows, rest)


def _check_count(count: int, num_units: int, num_groups: int) -> None:
    if count % num_groups or not 0 <= count <= num_units - num_groups:
        raise ValueError(f"{count} units of {num_units} in {num_groups} groups")


def relative_errors(dense: Tensor, pruned: Tensor, hessian: Tensor, columns: Tensor) -> tuple[float, float]:
    """Output error, as a share of the output's energy, of zeroing ``columns`` alone and of the weights ``pruned``.

    Computed in the Hessian's own dtype, whose rounding can turn a singular Hessian indefinite: never below 0.
    """
    dense, pruned = dense.to(hessian.dtype), pruned.to(hessian.dtype)
    energy = ((dense @ hessian) * dense).sum()
    removed = dense[:, columns]
    zeroed = ((removed @ hessian[columns][:, columns]) * removed).sum()
    change = dense - pruned
    compensated = ((change @ hessian) * change).sum()
    share = torch.stack([zeroed, compensated]).clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return share[0].item(), share[1].item()
