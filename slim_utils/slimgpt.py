"""OBS pruning of one linear map: the maths of SlimGPT, knowing nothing of models.

For a linear map ``W`` (out × in) and calibration inputs ``x``, ``H = (2/n) Σ x xᵀ``. Removing the input columns ``S``
with the optimal change of what remains costs ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` and leaves
``W − W_S (H⁻¹_SS)⁻¹ H⁻¹_S,:`` (Ling et al., SlimGPT, NeurIPS 2024; Hassibi & Stork, Optimal Brain Surgeon).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slim_utils.errors import UserError

logger = logging.getLogger(__name__)

SOLVE_DTYPE = torch.float64
FIRST_RAISED_PERCDAMP = 1e-6
LARGEST_PERCDAMP = 1.0


@dataclass(frozen=True)
class PruneResult:
    """What :meth:`SlimGPT.struct_prune` did.

    Attributes:
        pruned_units: ascending indices of the units (heads, kv groups or columns) that were removed.
        kept_units: ascending indices of the others.
        error_zeroed: ``tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`` had the columns been zeroed without compensation.
        error: the same for the weights as they now are.
        percdamp: damping used; larger than asked where the Hessian was not positive-definite.
    """

    pruned_units: list[int]
    kept_units: list[int]
    error_zeroed: float
    error: float
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
        self.hessian: Tensor | None = torch.zeros(
            self.columns, self.columns, dtype=torch.float32, device=linear.weight.device
        )
        self.num_samples = 0

    def add_batch(self, inputs: Tensor) -> None:
        """Add the outer products of a batch of inputs to the Hessian, in fp32.

        Args:
            inputs: (samples, tokens, in) or (tokens, in; counted as one sample), any floating dtype.
        """
        if inputs.dim() == 2:
            inputs = inputs.unsqueeze(0)
        total = self.num_samples + inputs.shape[0]
        tokens = inputs.reshape(-1, self.columns).float()
        self.hessian.mul_(self.num_samples / total)
        self.hessian.addmm_(tokens.T, tokens, alpha=2 / total)
        self.num_samples = total

    @torch.no_grad()
    def struct_prune(
        self,
        sparsity: float,
        unit_size: int = 1,
        percdamp: float = 0.01,
        compensate: bool = True,
        num_groups: int = 1,
    ) -> PruneResult:
        """Zero ``round(units · sparsity)`` units of columns (never all) and compensate in the others.

        A unit of one column goes in groups of dynamic size, a larger one (a head, a kv group) alone; after each, the
        scores are taken anew. Where the Hessian is not positive-definite the damping is raised tenfold until it is.

        Args:
            sparsity: share of the units to remove, in [0, 1).
            unit_size: columns of a unit, side by side: 1, ``head_dim``, or ``head_dim`` · heads of a kv group.
            percdamp: damping added to the diagonal of the Hessian, as a share of its mean.
            compensate: whether the remaining weights take over what was removed.
            num_groups: groups of units, side by side, that have to lose equally many each, and never all.

        Raises:
            UserError: if the activations seen were not finite, or no damping helps.
        """
        if not torch.isfinite(self.hessian).all():
            raise UserError(f"{self.name}: non-finite activations; try --dtype bfloat16 or float32")
        hessian = self.hessian.to(SOLVE_DTYPE)
        weight = self.linear.weight.to(SOLVE_DTYPE, copy=True)
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0

        num_units = self.columns // unit_size
        target = units_to_remove(num_units, sparsity, num_groups)
        for damping in damping_steps(percdamp):
            damped = hessian.clone()
            damped.diagonal().add_(damping * hessian.diagonal().mean())
            pruned_weight = weight.clone()
            units = greedy_obs(pruned_weight, damped, target, unit_size, compensate, num_groups)
            if units is None:
                continue
            error_zeroed, error = relative_errors(weight, pruned_weight, hessian, unit_columns(units, unit_size))
            # Exact arithmetic never ends worse than plain zeroing; where it does, the solve was too ill-conditioned.
            if not error <= error_zeroed * (1 + 1e-6) + 1e-12:
                continue
            if damping != percdamp:
                logger.warning(
                    "%s: Hessian not positive-definite at percdamp %g; raised to %g", self.name, percdamp, damping
                )
            self.linear.weight.copy_(pruned_weight)
            pruned = sorted(units.tolist())
            kept = sorted(set(range(num_units)) - set(pruned))
            return PruneResult(pruned, kept, error_zeroed, error, damping)
        raise UserError(f"{self.name}: Hessian not positive-definite at any damping; raise --num_samples or --percdamp")

    def free(self) -> None:
        """Let go of the Hessian."""
        self.hessian = None


def units_to_remove(num_units: int, sparsity: float, num_groups: int = 1) -> int:
    """``round(units · sparsity)``, equally many of every group, and never all."""
    group_size = num_units // num_groups
    return num_groups * min(round(group_size * sparsity), group_size - 1)


def damping_steps(percdamp: float) -> Iterator[float]:
    """The damping asked for, then ten times as much at each step, up to the mean of the diagonal itself."""
    yield percdamp
    raised = max(percdamp * 10, FIRST_RAISED_PERCDAMP)
    while raised <= LARGEST_PERCDAMP:
        yield raised
        raised *= 10


def group_sizes(target: int, unit_size: int) -> Iterator[int]:
    """Units to remove at each step; they add up to ``target``.

    Larger units go one by one. Columns go by the paper's dynamic group size: it starts at ``(target − 512) // 2`` and
    becomes ``(size − 512) // 2``, and a step takes that many, at least 64, at most 1024.
    """
    if unit_size > 1:
        yield from [1] * target
        return
    left, size = target, (target - 512) // 2
    while left:
        count = min(left, max(size, 64), 1024)
        yield count
        left -= count
        size = (size - 512) // 2


def unit_columns(units: Tensor, unit_size: int) -> Tensor:
    """Column indices (units · unit_size) of the given units."""
    return (units[:, None] * unit_size + torch.arange(unit_size, device=units.device)).flatten()


def unit_scores(weight: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """The original's score of every unit (paper, grouped Cholesky): ``Σ W² / diag(chol(H⁻¹ block))²``.

    Args:
        weight: (out, in) current weights.
        inverse: (in, in) inverse Hessian of the remaining columns, identity elsewhere.
        unit_size: columns of a unit.

    Returns:
        (units,) scores; NaN for a unit whose block is not positive-definite.
    """
    if unit_size == 1:
        pivots = inverse.diagonal()
    else:
        blocks = inverse.reshape(-1, unit_size, inverse.shape[0] // unit_size, unit_size)
        blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        factors, info = torch.linalg.cholesky_ex(blocks)
        pivots = factors.diagonal(dim1=-2, dim2=-1).square()
        pivots = pivots.masked_fill(info[:, None] != 0, torch.nan).flatten()
    return (weight.square().sum(dim=0) / pivots).view(-1, unit_size).sum(dim=1)


def greedy_obs(
    weight: Tensor, hessian: Tensor, target: int, unit_size: int, compensate: bool, num_groups: int = 1
) -> Tensor | None:
    """Remove ``target`` units from ``weight`` (out × in, in place), those of lowest score at each step.

    Of several groups of units, only those that have lost the fewest so far are looked at.

    After a step that removes ``S`` the inverse Hessian of the remaining columns is got by the block downdate
    ``H⁻¹ − H⁻¹_:,S (H⁻¹_SS)⁻¹ H⁻¹_S,:`` rather than by another factorisation.

    Returns:
        Indices of the removed units in the order of their removal, or ``None`` where a matrix was not
        positive-definite (``weight`` is then of no use).
    """
    factor, info = torch.linalg.cholesky_ex(hessian)
    if info != 0:
        return None
    inverse = torch.cholesky_inverse(factor)
    pruned = torch.zeros(weight.shape[1] // unit_size, dtype=torch.bool, device=weight.device)
    order: list[Tensor] = []
    for count in group_sizes(target, unit_size):
        losses = pruned.view(num_groups, -1).sum(dim=1, keepdim=True)
        closed = pruned | (losses > losses.min()).expand(num_groups, len(pruned) // num_groups).flatten()
        scores = unit_scores(weight, inverse, unit_size).masked_fill(closed, torch.inf)
        if scores.isnan().any() or (scores < 0).any():
            return None
        units = scores.argsort(stable=True)[:count]
        if not remove_columns(weight, inverse, unit_columns(units, unit_size), compensate):
            return None
        pruned[units] = True
        order.append(units)
    return torch.cat(order) if order else torch.empty(0, dtype=torch.long, device=weight.device)


def remove_columns(weight: Tensor, inverse: Tensor, columns: Tensor, compensate: bool) -> bool:
    """One OBS step: zero ``columns`` of ``weight``, compensate, and downdate ``inverse``; all in place.

    Returns:
        False where the block of ``inverse`` is not positive-definite; nothing is changed then.
    """
    rows = inverse[columns]
    factor, info = torch.linalg.cholesky_ex(rows[:, columns])
    if info != 0:
        return False
    solved = torch.cholesky_solve(rows, factor)
    if compensate:
        weight.addmm_(weight[:, columns], solved, alpha=-1)
    weight[:, columns] = 0
    inverse.addmm_(rows.T, solved, alpha=-1)
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
    return True


def relative_errors(dense: Tensor, pruned: Tensor, hessian: Tensor, columns: Tensor) -> tuple[float, float]:
    """Output error, as a share of the output's energy, of zeroing ``columns`` alone and of the weights ``pruned``."""
    energy = ((dense @ hessian) * dense).sum()
    removed = dense[:, columns]
    zeroed = ((removed @ hessian[columns][:, columns]) * removed).sum()
    change = dense - pruned
    compensated = ((change @ hessian) * change).sum()
    share = torch.stack([zeroed, compensated]) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return share[0].item(), share[1].item()
