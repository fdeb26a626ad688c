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

from slim_utils.errors import UserError

logger = logging.getLogger(__name__)

SOLVE_DTYPE = torch.float64
FIRST_RAISED_PERCDAMP = 1e-6
LARGEST_PERCDAMP = 1.0
# Blocks of a Gram matrix that only its upper ones are computed of: so many a row, none narrower than this.
GRAM_BLOCKS, GRAM_BLOCK = 8, 256
INVERSE_BLOCK = 1024


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
            upper = self._gram.triu_().mul_(2 / max(self.num_samples, 1))
            self._hessian = upper + upper.triu(1).T
            self._gram = None
        return self._hessian

    @hessian.setter
    def hessian(self, hessian: Tensor) -> None:
        self._hessian, self._gram = hessian, None

    def add_batch(self, inputs: Tensor) -> None:
        """Add the outer products of a batch of inputs to the Hessian, in fp32; not after it was looked at.

        Args:
            inputs: (samples, tokens, in) or (tokens, in; counted as one sample), any floating dtype.
        """
        if inputs.dim() == 2:
            inputs = inputs.unsqueeze(0)
        add_gram(self._gram, inputs.reshape(-1, self.columns))
        self.num_samples += inputs.shape[0]

    def add_up(self, add: Callable[[Tensor], None]) -> None:
        """Add what others have seen to what this one has, by ``add``, which sums a tensor in place over all of them."""
        count = torch.tensor(float(self.num_samples), device=self._gram.device)
        add(self._gram)
        add(count)
        self.num_samples = int(count.item())

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
        hessian = self.hessian.to(SOLVE_DTYPE, copy=True)
        weight = self.linear.weight.to(SOLVE_DTYPE, copy=True)
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0

        num_units = self.columns // unit_size
        target = units_to_remove(num_units, sparsity, num_groups)
        diagonal = hessian.diagonal().clone()
        for damping in damping_steps(percdamp):
            hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
            pruned_weight = weight.clone()
            units = greedy_obs(pruned_weight, hessian, target, unit_size, compensate, num_groups)
            if units is None:
                continue
            error_zeroed, error = relative_errors(weight, pruned_weight, self.hessian, unit_columns(units, unit_size))
            # Exact arithmetic never ends worse than plain zeroing; where it does, the solve was too ill-conditioned.
            if not error <= error_zeroed * (1 + 1e-4) + 1e-12:
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
    inverse = inverse_of_factored(factor)
    pruned = torch.zeros(weight.shape[1] // unit_size, dtype=torch.bool, device=weight.device)
    # Looked at once, at the end, so that nothing waits for the device at each step.
    sound = torch.ones((), dtype=torch.bool, device=weight.device)
    order: list[Tensor] = []
    for count in group_sizes(target, unit_size):
        losses = pruned.view(num_groups, -1).sum(dim=1, keepdim=True)
        closed = pruned | (losses > losses.min()).expand(num_groups, len(pruned) // num_groups).flatten()
        scores = unit_scores(weight, inverse, unit_size).masked_fill(closed, torch.inf)
        units = scores.argsort(stable=True)[:count]
        sound &= (scores >= 0).all() & remove_columns(weight, inverse, unit_columns(units, unit_size), compensate)
        pruned[units] = True
        order.append(units)
    if not sound:
        return None
    return torch.cat(order) if order else torch.empty(0, dtype=torch.long, device=weight.device)


def inverse_of_factored(factor: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹`` of a lower triangular ``factor`` (n, n), by blocks of columns.

    Only what the triangles leave is computed, a third of the products of whole matrices, and all of it as products of
    blocks; on a CPU LAPACK's own routine takes up to three times as long for wide layers.
    """
    size = len(factor)
    lower, inverse = torch.zeros_like(factor), torch.empty_like(factor)
    for start in range(0, size, INVERSE_BLOCK):
        unit = torch.eye(size - start, min(INVERSE_BLOCK, size - start), dtype=factor.dtype, device=factor.device)
        solved = torch.linalg.solve_triangular(factor[start:, start:], unit, upper=False)
        lower[start:, start : start + INVERSE_BLOCK] = solved
    for start in range(0, size, INVERSE_BLOCK):
        stop = min(start + INVERSE_BLOCK, size)
        rows = lower[start:, start:stop].T @ lower[start:, :stop]
        inverse[start:stop, :stop] = rows
        inverse[:start, start:stop] = rows[:, :start].T
    return inverse


def remove_columns(weight: Tensor, inverse: Tensor, columns: Tensor, compensate: bool) -> Tensor:
    """One OBS step: zero ``columns`` of ``weight``, compensate, and downdate ``inverse``; all in place.

    Returns:
        Whether the block of ``inverse`` was positive-definite, a bool on the device; both are of no use otherwise.
    """
    rows = inverse[columns]
    factor, info = torch.linalg.cholesky_ex(rows[:, columns])
    solved = torch.cholesky_solve(rows, factor)
    if compensate:
        weight.addmm_(weight[:, columns], solved, alpha=-1)
    weight[:, columns] = 0
    inverse.addmm_(rows.T, solved, alpha=-1)
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
    return info == 0


def relative_errors(dense: Tensor, pruned: Tensor, hessian: Tensor, columns: Tensor) -> tuple[float, float]:
    """Output error, as a share of the output's energy, of zeroing ``columns`` alone and of the weights ``pruned``.

    Computed in the Hessian's own dtype.
    """
    dense, pruned = dense.to(hessian.dtype), pruned.to(hessian.dtype)
    energy = ((dense @ hessian) * dense).sum()
    removed = dense[:, columns]
    zeroed = ((removed @ hessian[columns][:, columns]) * removed).sum()
    change = dense - pruned
    compensated = ((change @ hessian) * change).sum()
    share = torch.stack([zeroed, compensated]) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return share[0].item(), share[1].item()
