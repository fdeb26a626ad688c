"""Greedy OBS on matrices: scores of units, their removal, and the inverse Hessian of what remains.

Removing the input columns ``S`` of ``W`` (out × in) with the optimal change of what remains costs
``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` (Ling et al., SlimGPT, NeurIPS 2024; Hassibi & Stork, Optimal Brain Surgeon).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_RAISED_PERCDAMP = 1e-6
LARGEST_PERCDAMP = 1.0
INVERSE_BLOCK = 1024


@dataclass(frozen=True)
class SelectionOptions:
    """How units are chosen; by default as in the paper.

    Attributes:
        exact_heads: whether a unit of several columns is scored by the error that its removal leaves,
            ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)``, rather than by the original's grouped Cholesky.
        column_group: single columns that go at a step, before scores are taken anew; 0 for the dynamic group size.
    """

    exact_heads: bool = False
    column_group: int = 0


PAPER_SELECTION = SelectionOptions()


@dataclass(frozen=True)
class Removal:
    """Units in the order of their removal, and what each step cost.

    Attributes:
        units: (n,) indices.
        steps: units that went at each step.
        costs: (steps,) ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` of each: with compensation they add up to ``tr(ΔW H ΔWᵀ)``.
    """

    units: Tensor
    steps: list[int]
    costs: Tensor


def damping_steps(percdamp: float) -> Iterator[float]:
    """The damping asked for, then ten times as much at each step, up to the mean of the diagonal itself."""
    yield percdamp
    raised = max(percdamp * 10, FIRST_RAISED_PERCDAMP)
    while raised <= LARGEST_PERCDAMP:
        yield raised
        raised *= 10


def group_sizes(target: int, unit_size: int, column_group: int = 0) -> Iterator[int]:
    """Units to remove at each step; they add up to ``target``.

    Larger units go one by one. Columns go ``column_group`` at a time or, if that is 0, by the paper's dynamic group
    size: it starts at ``(target − 512) // 2`` and becomes ``(size − 512) // 2``, and a step takes that many, at least
    64, at most 1024.
    """
    size = (target - 512) // 2
    while target:
        count = 1 if unit_size > 1 else min(target, column_group or max(min(size, 1024), 64))
        yield count
        target -= count
        size = (size - 512) // 2


def unit_columns(units: Tensor, unit_size: int) -> Tensor:
    """Column indices (units · unit_size) of the given units."""
    return (units[:, None] * unit_size + torch.arange(unit_size, device=units.device)).flatten()


def unit_scores(weight: Tensor, inverse: Tensor, unit_size: int, exact: bool = False) -> Tensor:
    """Score of every unit: the original's ``Σ W² / diag(chol(H⁻¹ block))²`` (paper, grouped Cholesky), or its error.

    For units of one column the two are the same.

    Args:
        weight: (out, in) current weights.
        inverse: (in, in) inverse Hessian of the remaining columns, identity elsewhere.
        unit_size: columns of a unit.
        exact: ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` instead.

    Returns:
        (units,) scores; NaN for a unit whose block is not positive-definite.
    """
    if unit_size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    units = inverse.shape[0] // unit_size
    blocks = inverse.reshape(units, unit_size, units, unit_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors, info = torch.linalg.cholesky_ex(blocks)
    if exact:
        columns = weight.view(-1, units, unit_size).permute(1, 2, 0)
        scores = torch.linalg.solve_triangular(factors, columns, upper=False).square().sum(dim=(1, 2))
    else:
        pivots = factors.diagonal(dim1=-2, dim2=-1).square()
        scores = (weight.square().sum(dim=0).view(units, unit_size) / pivots).sum(dim=1)
    return scores.masked_fill(info != 0, torch.nan)


def greedy_obs(
    weight: Tensor,
    hessian: Tensor,
    target: int,
    unit_size: int,
    compensate: bool,
    num_groups: int = 1,
    selection: SelectionOptions = PAPER_SELECTION,
) -> Removal | None:
    """Remove ``target`` units from ``weight`` (out × in, in place), those of lowest score at each step.

    Of several groups of units, only those that have lost the fewest so far are looked at.

    After a step that removes ``S`` the inverse Hessian of the remaining columns is got by the block downdate
    ``H⁻¹ − H⁻¹_:,S (H⁻¹_SS)⁻¹ H⁻¹_S,:`` rather than by another factorisation.

    Returns:
        What was removed, or ``None`` where a matrix was not positive-definite (``weight`` is then of no use).
    """
    factor, info = torch.linalg.cholesky_ex(hessian)
    if info != 0:
        return None
    inverse = inverse_of_factored(factor)
    pruned = torch.zeros(weight.shape[1] // unit_size, dtype=torch.bool, device=weight.device)
    # Looked at once, at the end, so that nothing waits for the device at each step.
    positive_definite = torch.ones((), dtype=torch.bool, device=weight.device)
    steps = list(group_sizes(target, unit_size, selection.column_group))
    order: list[Tensor] = [torch.empty(0, dtype=torch.long, device=weight.device)]
    costs = weight.new_zeros(len(steps))
    for step, count in enumerate(steps):
        losses = pruned.view(num_groups, -1).sum(dim=1, keepdim=True)
        closed = pruned | (losses > losses.min()).expand(num_groups, len(pruned) // num_groups).flatten()
        scores = unit_scores(weight, inverse, unit_size, selection.exact_heads).masked_fill(closed, torch.inf)
        units = scores.argsort(stable=True)[:count]
        solved, costs[step] = remove_columns(weight, inverse, unit_columns(units, unit_size), compensate)
        positive_definite &= (scores >= 0).all() & solved
        pruned[units] = True
        order.append(units)
    return Removal(torch.cat(order), steps, costs) if positive_definite else None


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


def remove_columns(weight: Tensor, inverse: Tensor, columns: Tensor, compensate: bool) -> tuple[Tensor, Tensor]:
    """One OBS step: zero ``columns`` of ``weight``, compensate, and downdate ``inverse``; all in place.

    Returns:
        Whether the block of ``inverse`` was positive-definite (all is of no use otherwise), and the cost
        ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)``; both on the device.
    """
    rows, removed = inverse[columns], weight[:, columns]
    factor, info = torch.linalg.cholesky_ex(rows[:, columns])
    solved = torch.cholesky_solve(rows, factor)
    cost = torch.linalg.solve_triangular(factor, removed.T, upper=False).square().sum()
    if compensate:
        weight.addmm_(removed, solved, alpha=-1)
    weight[:, columns] = 0
    inverse.addmm_(rows.T, solved, alpha=-1)
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
    return info == 0, cost
