"""The SlimGPT solver on matrices: greedy structured OBS on W (out × in) and the inverse Hessian H⁻¹ (in × in).

Pruning the columns S of W with the optimal compensation costs ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` and leaves
``W − W_S (H⁻¹_SS)⁻¹ H⁻¹_S,:`` (Ling et al., SlimGPT, NeurIPS 2024; Hassibi & Stork, Optimal Brain Surgeon).

The inverse Hessian of the columns that remain is ``H⁻¹ − PᵀP``, where the panels ``P = L⁻¹ H⁻¹_S,:`` have a row for
each pruned column and ``H⁻¹_SS = L Lᵀ``. The solver is left-looking: a step forms the rows of the columns that it
prunes and updates the diagonal blocks that scores are made of, never the whole matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_RAISED_PERCDAMP = 1e-6
LARGEST_PERCDAMP = 1.0
# A Gram matrix is computed by so many blocks of rows, none narrower than this.
GRAM_BLOCKS, GRAM_BLOCK = 8, 256
INVERSE_BLOCK = 256
# Rows of sums of squares that are computed at once, and of the outputs' energy.
CPU_ROWS, GPU_ROWS, ENERGY_ROWS = 64, 256, 1024
# Largest step of the dynamic group size.
MAX_STEP = 1024


@dataclass(frozen=True)
class SelectionOptions:
    """How units are selected; the defaults are the paper's.

    Attributes:
        exact_heads: score a unit of several columns by the error of pruning it, ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)``, instead of
            the paper's grouped Cholesky.
        column_group: single columns pruned per step, before scores are updated; 0 for the dynamic group size.
    """

    exact_heads: bool = False
    column_group: int = 0


PAPER_SELECTION = SelectionOptions()


@dataclass(frozen=True)
class Removal:
    """Pruned units in the order of their removal, and the cost of each step.

    Attributes:
        units: (n,) indices.
        steps: units pruned at each step.
        costs: (steps,) ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` of each step; with compensation their sum is ``tr(ΔW H ΔWᵀ)``
            for the damped H.
        row_costs: (out,) the same sum, by output row.
    """

    units: Tensor
    steps: list[int]
    costs: Tensor
    row_costs: Tensor


def damping_steps(percdamp: float) -> Iterator[float]:
    """``percdamp``, then ten times as much at each step, up to the mean of the diagonal itself."""
    yield percdamp
    raised = max(percdamp * 10, FIRST_RAISED_PERCDAMP)
    while raised <= LARGEST_PERCDAMP:
        yield raised
        raised *= 10


def group_sizes(target: int, unit_size: int, column_group: int = 0) -> Iterator[int]:
    """Units to prune at each step; the sum is ``target``.

    Heads are pruned one at a time. Columns are pruned ``column_group`` at a time or, if that is 0, by the paper's
    dynamic group size: it starts at ``(target − 512) // 2`` and becomes ``(size − 512) // 2``, clamped to 64 and
    ``MAX_STEP``.
    """
    size = (target - 512) // 2
    while target:
        count = 1 if unit_size > 1 else min(target, column_group or max(min(size, MAX_STEP), 64))
        yield count
        target -= count
        size = (size - 512) // 2


def unit_columns(units: Tensor, unit_size: int) -> Tensor:
    """Column indices (units · unit_size) of the given units."""
    return (units[:, None] * unit_size + torch.arange(unit_size, device=units.device)).flatten()


def add_gram(gram: Tensor, tokens: Tensor) -> None:
    """Add ``tokensᵀ tokens`` to the upper triangle of ``gram`` (in, in), in place; the rest is undefined.

    Rows of blocks from the diagonal on take little more than half the products. Half-precision tokens on a GPU go
    through its tensor cores, whose products of two are exact in fp32; everything else is computed in fp32.
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


def symmetrise_upper(matrix: Tensor) -> Tensor:
    """``matrix`` (n, n) with its lower triangle replaced by the transposed upper one, in place."""
    for start in range(0, len(matrix), GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, len(matrix))
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def output_energy(W: Tensor, H: Tensor) -> float:
    """``tr(W H Wᵀ)`` in the dtype of the symmetric ``H`` (in, in), of which only the upper triangle is multiplied."""
    total = torch.zeros((), dtype=torch.float64, device=H.device)
    # By rows, so that no copy of W in another dtype is needed.
    for rows in W.split(ENERGY_ROWS):
        rows = rows.to(H.dtype)
        for start in range(0, len(H), GRAM_BLOCK):
            stop = min(start + GRAM_BLOCK, len(H))
            products = rows[:, start:stop].T @ rows[:, start:] * H[start:stop, start:]
            total += 2 * products.sum() - products[:, : stop - start].sum()
    return total.item()


def solve_bytes(columns: int, rows: int, pruned: int, dtype: torch.dtype) -> int:
    """Bytes that solving a map of ``columns`` inputs and ``rows`` outputs takes at its peak, besides its own weight.

    The fp32 Hessian and one matrix in the dtype of the solve, a panel for every pruned column, the weights, and the
    rows of the largest step.
    """
    blocks = 2 * INVERSE_BLOCK * columns * 8
    step = 2 * min(pruned, MAX_STEP) * (columns + rows) * dtype.itemsize
    return columns * columns * (4 + dtype.itemsize) + (pruned + rows) * columns * dtype.itemsize + step + blocks


def invert_in_place(H: Tensor) -> bool:
    """Replace the symmetric ``H`` (n, n; contiguous) by its inverse; no second matrix of its size is allocated.

    Returns:
        Whether ``H`` was positive-definite; its content is undefined if not.
    """
    # Column-major, as LAPACK wants it.
    L, size = H.mT, len(H)
    info = torch.empty((), dtype=torch.int32, device=H.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    if info != 0:
        return False
    blocks = [slice(start, min(start + INVERSE_BLOCK, size)) for start in range(0, size, INVERSE_BLOCK)]
    # L⁻¹, from the last block column to the first.
    for j in reversed(blocks):
        identity = torch.eye(j.stop - j.start, dtype=H.dtype, device=H.device)
        diagonal = torch.linalg.solve_triangular(L[j, j], identity, upper=False)
        for i in reversed([block for block in blocks if block.start > j.start]):
            below = slice(j.stop, i.stop)
            L[i, j] = (L[i, below] @ L[below, j]) @ -diagonal
        L[j, j] = diagonal
    # L⁻ᵀ L⁻¹, row by row: row i needs rows from i on.
    for i in blocks:
        rows = L[i.start :, i].T @ L[i.start :, : i.stop]
        L[i, : i.stop] = rows
        L[: i.start, i] = rows[:, : i.start].T
    return True


def diagonal_blocks(matrix: Tensor, unit_size: int) -> Tensor:
    """A copy of the diagonal blocks (units, unit_size, unit_size) of ``matrix``; its diagonal (n,) for units of 1."""
    if unit_size == 1:
        return matrix.diagonal().clone()
    units = len(matrix) // unit_size
    return matrix.view(units, unit_size, units, unit_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def column_energy(matrix: Tensor) -> Tensor:
    """``Σ x²`` of every column (n,), by blocks of rows that a CPU's cache holds."""
    energy = matrix.new_zeros(matrix.shape[1])
    for rows in matrix.split(CPU_ROWS if matrix.device.type == "cpu" else GPU_ROWS):
        energy += rows.square().sum(dim=0)
    return energy


def unit_scores(W: Tensor, blocks: Tensor, exact: bool = False) -> Tensor:
    """Score of every unit: the paper's grouped Cholesky ``Σ W² / diag(chol(H⁻¹_SS))²``, or its exact pruning error.

    The two are the same for units of one column.

    Args:
        W: (out, in) current weights.
        blocks: diagonal blocks of the current inverse Hessian, as :func:`diagonal_blocks` returns them.
        exact: ``tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ)`` instead.

    Returns:
        (units,) scores; NaN for a unit whose block is not positive-definite.
    """
    energy = column_energy(W)
    if blocks.dim() == 1:
        return energy / blocks
    num_units, unit_size, _ = blocks.shape
    L, info = torch.linalg.cholesky_ex(blocks)
    if exact:
        columns = W.view(-1, num_units, unit_size).permute(1, 2, 0)
        scores = torch.linalg.solve_triangular(L, columns, upper=False).square().sum(dim=(1, 2))
    else:
        pivots = L.diagonal(dim1=-2, dim2=-1).square()
        scores = (energy.view(num_units, unit_size) / pivots).sum(dim=1)
    return scores.masked_fill(info != 0, torch.nan)


def greedy_obs(
    W: Tensor,
    Hinv: Tensor,
    target: int,
    unit_size: int,
    compensate: bool,
    num_groups: int = 1,
    selection: SelectionOptions = PAPER_SELECTION,
) -> Removal | None:
    """Prune ``target`` units of ``W`` (out × in, in place), those of the lowest score at each step.

    With several groups of units, a step considers only the groups that have lost the fewest units so far.

    Args:
        W: weights; those of pruned columns end as 0.
        Hinv: (in, in) inverse of the damped Hessian, unchanged.
        target: units to prune.
        unit_size: columns of a unit.
        compensate: whether the remaining weights are updated.
        num_groups: groups of units, side by side.
        selection: how units are selected.

    Returns:
        What was pruned, or ``None`` where a matrix was not positive-definite (``W`` is undefined then).
    """
    steps = list(group_sizes(target, unit_size, selection.column_group))
    blocks = diagonal_blocks(Hinv, unit_size)
    P = Hinv.new_empty(target * unit_size, len(Hinv))
    pruned = torch.zeros(W.shape[1] // unit_size, dtype=torch.bool, device=W.device)
    order, costs, row_costs = [], W.new_zeros(len(steps)), W.new_zeros(len(W))
    # Read once, at the end: no step waits for the device.
    positive_definite = torch.ones((), dtype=torch.bool, device=W.device)
    rank = 0
    for step, count in enumerate(steps):
        scores = unit_scores(W, blocks, selection.exact_heads).masked_fill(_closed(pruned, num_groups), torch.inf)
        units = scores.argsort(stable=True)[:count]
        S = unit_columns(units, unit_size)
        # Rows of the current inverse Hessian, and the panel of this step.
        rows = Hinv[S].addmm_(P[:rank, S].T, P[:rank], alpha=-1)
        L, info = torch.linalg.cholesky_ex(rows[:, S])
        panel = torch.linalg.solve_triangular(L, rows, upper=False, out=P[rank : rank + len(S)])
        E = torch.linalg.solve_triangular(L.T, W[:, S], upper=True, left=False)
        if compensate:
            W.addmm_(E, panel, alpha=-1)
        _downdate(blocks, panel)
        squares = E.square()
        costs[step] = squares.sum()
        row_costs += squares.sum(dim=1)
        positive_definite &= (scores >= 0).all() & (info == 0)
        pruned[units] = True
        order.append(units)
        rank += len(S)
        del rows, E, squares
    units = torch.cat(order) if order else torch.empty(0, dtype=torch.long, device=W.device)
    W[:, unit_columns(units, unit_size)] = 0
    return Removal(units, steps, costs, row_costs) if positive_definite else None


def _closed(pruned: Tensor, num_groups: int) -> Tensor:
    """Units (n,) that a step may not prune: pruned ones, and all of groups that have lost more than another."""
    losses = pruned.view(num_groups, -1).sum(dim=1, keepdim=True)
    return pruned | (losses > losses.min()).expand(num_groups, len(pruned) // num_groups).flatten()


def _downdate(blocks: Tensor, panel: Tensor) -> None:
    """Subtract from diagonal ``blocks`` those of ``panelᵀ panel``, in place."""
    if blocks.dim() == 1:
        blocks.sub_(column_energy(panel))
        return
    num_units, unit_size, _ = blocks.shape
    by_unit = panel.view(len(panel), num_units, unit_size).transpose(0, 1)
    blocks.baddbmm_(by_unit.transpose(1, 2), by_unit, alpha=-1)
