"""Removal of whole experts of an MoE layer: REAP scores, and a least-squares refit of the experts that stay.

The score of expert j is the mean, over the tokens that the router sends to it, of ``g_j(x) · ‖f_j(x)‖``: its gate times
the norm of its output (REAP, Lasby et al., 2025). Those of the lowest scores are removed at once, and the router
chooses among the others. With the inputs ``z_j = g_j(x) a_j(x)`` of its down projection ``W_j`` and ``z_j = 0`` for the
tokens of others, the layer's output is ``Σ_j W_j z_j``, but for biases; the refit minimises ``Σ ‖y − Σ_j W_j z_j‖²``
for the outputs y of the dense layer, one expert at a time. With the residual ``r = y − Σ_j W_j z_j``,
``H = (2/n) Σ z_j z_jᵀ`` and ``R = (2/n) Σ r z_jᵀ``, the update of ``W_j`` is ``ΔW = R (H + λI)⁻¹``.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slim_utils.common.errors import UserError
from slim_utils.layerwise.distributed import SINGLE_PROCESS, ProcessGroup
from slim_utils.layerwise.experts import Experts, RoutedTokens, tokens_of_expert
from slim_utils.layerwise.layer_report import ExpertRefit
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.obs import add_gram, damping_steps, symmetrise_upper
from slim_utils.routers import Router
from slim_utils.slimgpt import PruneResult

logger = logging.getLogger(__name__)

# Passes over the experts; a later one has little left to improve.
SWEEPS = 3
# Every so many samples, one is held out.
HELD_OUT_EVERY = 5

# Inputs of the router on whole samples and its choice: (tokens, hidden), (tokens, k) experts, (tokens, k) gates.
ExpertCall = tuple[Tensor, ...]


@dataclass
class _Batch:
    """Tokens of one forward, on ``cache_dev``.

    Attributes:
        hidden: (tokens, hidden) inputs of the router.
        residual: (tokens, outputs) what the experts' output lacks of the dense layer's, fp32 or fp64.
        held_out: (tokens,) whether a token belongs to a sample that is held out.
        experts: (tokens, k) experts of a token.
        gates: (tokens, k) their weights.
    """

    hidden: Tensor
    residual: Tensor
    held_out: Tensor
    experts: Tensor
    gates: Tensor


@dataclass(frozen=True)
class _Statistics:
    """``H`` (columns, columns) and ``R`` (outputs, columns) of tokens of one expert; both without 2/n."""

    H: Tensor
    R: Tensor

    def error_change(self, delta: Tensor) -> float:
        """Change of the squared error of these tokens if ``delta`` (outputs, columns) is added to the weights."""
        return ((delta @ self.H - 2 * self.R) * delta).sum().item()


@dataclass(frozen=True)
class _SquaredErrors:
    """Squared error of the layer's output, of all tokens and of those that are held out."""

    all: float
    held_out: float


def prune_whole_experts(
    experts: Experts,
    router: Router,
    name: str,
    calls: Iterable[tuple[ExpertCall, int]],
    count: int,
    settings: PruningSettings,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[PruneResult, ExpertRefit]:
    """Remove the ``count`` experts of lowest score and refit the others, in place; the router is masked.

    A router that chooses among groups of experts loses as many from every group, those of lowest score in it.

    A fifth of the samples is held out: the damping of each refit is the best for them, from ``percdamp`` up in steps of
    ten, and a refit that does not lower their error is dropped. Without compensation nothing is refitted, and neither
    is it with a single sample.

    Args:
        experts: of the layer; the weights of removed experts are left.
        router: of the layer.
        name: of the experts in messages.
        calls: inputs of the router and its choice when dense, batch by batch, and the tokens of a sample.
        count: experts to remove.
        settings: how layers are pruned.
        processes: processes that share the calibration samples.

    Returns:
        Columns of the removed and of the kept experts, numbered through all experts, with the error of the layer's
        output as a share of its energy before and after the refit; and what was refitted.

    Raises:
        UserError: if activations are not finite.
    """
    down_proj = experts.down_proj
    num_experts, _, columns = down_proj.shape
    batches, scores = _dense_outputs(experts, calls, settings, processes)
    if not scores.isfinite().all():
        raise UserError(f"{name}: non-finite activations; try --dtype bfloat16 or float32")
    energy = _squared_errors(batches, processes)
    removed = lowest(scores, count, router.num_groups)
    kept = sorted(set(range(num_experts)) - set(removed))
    router.mask(kept)
    _reroute(experts, router, batches, settings)
    before = _squared_errors(batches, processes)
    refitted: set[int] = set()
    if settings.compensate and count and energy.held_out:
        for _ in range(SWEEPS):
            refitted |= {index for index in kept if _refit(experts, index, batches, settings, processes)}
    elif settings.compensate and count:
        logger.warning("%s: nothing is held out of a single sample, and nothing refitted; raise --num_samples", name)
    after = _squared_errors(batches, processes)
    result = PruneResult(
        pruned_units=_columns_of(removed, columns),
        kept_units=_columns_of(kept, columns),
        error_uncompensated=before.all / (energy.all or 1),
        error_compensated=after.all / (energy.all or 1),
        percdamp=settings.percdamp,
        solve_dtype=str(settings.solve_dtype).removeprefix("torch."),
        solve_device=str(down_proj.device),
    )
    held_out = (errors.held_out / (energy.held_out or 1) for errors in (before, after))
    return result, ExpertRefit(scores.tolist(), removed, sorted(refitted), *held_out)


def lowest(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return the ``count`` experts of lowest score, in ascending order; of equal scores, the first.

    Args:
        scores: (experts,) scores.
        count: experts to return.
        groups: groups of as many experts side by side, which share ``count`` equally.

    Raises:
        ValueError: if they cannot.
    """
    if count % groups:
        raise ValueError(f"{count} experts of {groups} groups")
    by_group = scores.view(groups, -1)
    chosen = by_group.argsort(dim=1, stable=True)[:, : count // groups]
    first = torch.arange(groups, device=scores.device)[:, None] * by_group.shape[1]
    return sorted((chosen + first).flatten().tolist())


def _columns_of(experts: list[int], columns: int) -> list[int]:
    return [index * columns + column for index in experts for column in range(columns)]


def _dense_outputs(
    experts: Experts, calls: Iterable[tuple[ExpertCall, int]], settings: PruningSettings, processes: ProcessGroup
) -> tuple[list[_Batch], Tensor]:
    """The tokens with the outputs of the dense layer as residuals, and the (experts,) REAP scores."""
    down_proj, batches, num_samples = experts.down_proj, [], 0
    sums = torch.zeros(2, len(down_proj), dtype=torch.float64, device=down_proj.device)
    for (hidden, top_k_index, top_k_weights), seqlen in calls:
        outputs = hidden.new_zeros(len(hidden), down_proj.shape[1], dtype=_accurate(hidden.dtype))
        for index in top_k_index.unique().tolist():
            routed = tokens_of_expert(experts, index, hidden, top_k_index, top_k_weights)
            output = _output(routed, down_proj[index])
            outputs.index_add_(0, routed.token, output)
            # Gates are positive: the norm of the weighted output is gate times norm.
            sums[0, index] += output.norm(dim=1).sum()
            sums[1, index] += len(routed.token)
        sample = num_samples + torch.arange(len(hidden), device=hidden.device) // seqlen
        num_samples += len(hidden) // seqlen
        tensors = hidden, outputs, sample % HELD_OUT_EVERY == 1, top_k_index, top_k_weights
        batches.append(_Batch(*(tensor.to(settings.cache_dev) for tensor in tensors)))
    processes.all_reduce(sums)
    return batches, (sums[0] / sums[1].clamp_min(1)).cpu()


def _reroute(experts: Experts, router: Router, batches: list[_Batch], settings: PruningSettings) -> None:
    """Send the tokens to the experts that ``router`` chooses now, and subtract their outputs from the residuals."""
    down_proj = experts.down_proj
    for batch in batches:
        chosen, gates = router.route(batch.hidden.to(settings.device))
        batch.gates, batch.experts = gates.to(settings.cache_dev), chosen.to(settings.cache_dev)
    for index in range(len(down_proj)):
        for part, routed in _routed_to(experts, index, batches, settings):
            _subtract(part, routed.token, _output(routed, down_proj[index]))


def _subtract(batch: _Batch, token: Tensor, outputs: Tensor) -> None:
    """Subtract ``outputs`` (n, outputs) from the residuals of the (n,) tokens."""
    batch.residual.index_add_(0, token.to(batch.residual.device), outputs.to(batch.residual), alpha=-1)


def _routed_to(
    experts: Experts, index: int, batches: list[_Batch], settings: PruningSettings
) -> Iterator[tuple[_Batch, RoutedTokens]]:
    """Batches with tokens of expert ``index``, and these tokens on the device."""
    for batch in batches:
        call = (tensor.to(settings.device) for tensor in (batch.hidden, batch.experts, batch.gates))
        routed = tokens_of_expert(experts, index, *call)
        if len(routed.token):
            yield batch, routed


def _refit(
    experts: Experts, index: int, batches: list[_Batch], settings: PruningSettings, processes: ProcessGroup
) -> bool:
    """Update the down projection of an expert and the residuals; returns whether the held-out samples agreed."""
    weight = experts.down_proj[index]
    outputs, columns = weight.shape
    shapes = ((columns, columns), (outputs, columns)) * 2
    H, R, H_held_out, R_held_out = (torch.zeros(shape, device=weight.device) for shape in shapes)
    for batch, routed in _routed_to(experts, index, batches, settings):
        inputs, token = routed.inputs, routed.token.to(settings.cache_dev)
        held_out, residual = batch.held_out[token].to(weight.device), batch.residual[token].to(weight.device)
        for part, gram, product in ((~held_out, H, R), (held_out, H_held_out, R_held_out)):
            add_gram(gram, inputs[part])
            product.addmm_(residual[part].float().T, inputs[part].float())
    for total in (H, R, H_held_out, R_held_out):
        processes.all_reduce(total)
    dtype, before = settings.solve_dtype, weight.clone()
    fitted, held = (
        _Statistics(symmetrise_upper(gram).to(dtype), product.to(dtype))
        for gram, product in ((H, R), (H_held_out, R_held_out))
    )
    stored = experts.module.get_parameter("down_proj").data[index]
    improved = processes.on_main(lambda: _update(weight, fitted, held, settings.percdamp), [stored])
    if improved:
        change = weight.to(_accurate(weight.dtype)) - before.to(_accurate(weight.dtype))
        for batch, routed in _routed_to(experts, index, batches, settings):
            _subtract(batch, routed.token, _map(routed.inputs, change))
    return improved


def _update(weight: Tensor, fitted: _Statistics, held: _Statistics, percdamp: float) -> bool:
    """Add ``R (H + λI)⁻¹`` to ``weight`` (outputs, columns), in place, if it lowers the error of both parts.

    Of the dampings from ``percdamp`` up, it is that of the lowest held-out error.
    """
    mean, best, lowest = fitted.H.diagonal().mean(), None, 0.0
    for damping in damping_steps(percdamp):
        damped = fitted.H.clone()
        damped.diagonal().add_(damping * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        if info:
            continue
        updated = (weight.to(damped.dtype) + torch.cholesky_solve(fitted.R.T, L).T).to(weight.dtype)
        # As stored: rounding is part of the change.
        change = updated.to(damped.dtype) - weight.to(damped.dtype)
        error = held.error_change(change)
        if error < lowest and fitted.error_change(change) < 0:
            best, lowest = updated, error
        elif best is not None:
            break
    if best is None:
        return False
    weight.copy_(best)
    return True


def _squared_errors(batches: list[_Batch], processes: ProcessGroup) -> _SquaredErrors:
    """Squared norms of the residuals, over all processes."""
    sums = torch.zeros(2, dtype=torch.float64, device=batches[0].residual.device)
    for batch in batches:
        norms = batch.residual.double().square().sum(dim=1)
        sums += torch.stack([norms.sum(), norms[batch.held_out].sum()])
    processes.all_reduce(sums)
    return _SquaredErrors(*sums.tolist())


def _output(routed: RoutedTokens, W: Tensor) -> Tensor:
    """What an expert with down projection ``W`` adds to the outputs of its tokens, in fp32 or fp64."""
    output = _map(routed.inputs, W)
    return output if routed.bias is None else output + routed.bias.to(output)


def _map(inputs: Tensor, W: Tensor) -> Tensor:
    """``W z`` of inputs (tokens, columns), in fp32 or fp64."""
    dtype = _accurate(inputs.dtype)
    return functional.linear(inputs.to(dtype), W.to(dtype))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
