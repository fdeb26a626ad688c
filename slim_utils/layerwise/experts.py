"""Pruning of MoE layers whose weights are 3-D parameters; each expert is pruned on the tokens routed to it."""

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from slim_utils.layerwise.distributed import SINGLE_PROCESS, ProcessGroup
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.slimgpt import PruneResult, SlimGPT

logger = logging.getLogger(__name__)

# Damping of an expert with too few tokens: the identity weighs as much as its Hessian.
UNDER_CALIBRATED_PERCDAMP = 1.0


def expert_linear(experts: nn.Module, index: int) -> nn.Linear:
    """Down projection of one expert; its weight (hidden, columns) is a view of that slice of ``experts.down_proj``."""
    weight = experts.get_parameter("down_proj").data[index]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def expert_inputs(
    experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Inputs (routed tokens, columns) of the down projection of every expert that tokens are routed to.

    The inputs are scaled by the router's weights, so that ``W x`` is the expert's contribution to the layer's output.

    Args:
        experts: with ``gate_up_proj`` (experts, 2 · columns, hidden), ``down_proj`` and ``act_fn``.
        hidden: (tokens, hidden) inputs of the module.
        top_k_index: (tokens, k) experts that each token is routed to.
        top_k_weights: (tokens, k) weights of the router.
    """
    for index in top_k_index.unique().tolist():
        yield index, tokens_of_expert(experts, index, hidden, top_k_index, top_k_weights)[1]


def tokens_of_expert(
    experts: nn.Module, index: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens that are routed to expert ``index``, and the inputs of its down projection as :func:`expert_inputs`."""
    gate_up_proj, act_fn = experts.get_parameter("gate_up_proj"), experts.get_submodule("act_fn")
    token, place = torch.where(top_k_index == index)
    gate, up = functional.linear(hidden[token], gate_up_proj[index]).chunk(2, dim=-1)
    return token, act_fn(gate) * up * top_k_weights[token, place, None]


def prune_experts(
    experts: nn.Module,
    name: str,
    calls: Iterable[tuple[Tensor, Tensor, Tensor]],
    count: int,
    settings: PruningSettings,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> PruneResult:
    """Prune the same number of FFN columns of every expert, in place.

    An under-calibrated expert, with fewer tokens than columns, is logged and pruned with a damping of at least
    ``UNDER_CALIBRATED_PERCDAMP``; an expert without tokens loses the columns of least magnitude.

    Args:
        experts: module with 3-D parameters.
        name: its name in messages.
        calls: arguments of ``experts``, as of :func:`expert_inputs`, batch by batch.
        count: columns to prune per expert.
        settings: how layers are pruned.
        processes: processes that share the calibration samples.

    Returns:
        Units numbered through all experts; errors as means over the experts, and the largest damping.
    """
    down_proj = experts.get_parameter("down_proj")
    num_experts, _, columns = down_proj.shape
    pruners = [SlimGPT(expert_linear(experts, index), f"{name} {index}") for index in range(num_experts)]
    counts = torch.zeros(num_experts, device=down_proj.device)
    for call in calls:
        for index, inputs in expert_inputs(experts, *call):
            pruners[index].add_batch(inputs)
            counts[index] += len(inputs)
    processes.all_reduce(counts)
    for pruner in pruners:
        pruner.all_reduce_hessian(processes.all_reduce)
    tokens = [int(count) for count in counts.tolist()]
    under_calibrated = [index for index in range(num_experts) if tokens[index] < columns]
    if under_calibrated:
        seen = ", ".join(f"{index} ({tokens[index]})" for index in under_calibrated)
        message = "%s: under-calibrated, fewer tokens than the %d columns: experts %s; percdamp raised to %g; raise "
        logger.warning(message + "--num_samples", name, columns, seen, UNDER_CALIBRATED_PERCDAMP)

    def solve() -> PruneResult:
        return _solve(pruners, tokens, count, settings)

    return processes.on_main(solve, [down_proj.data])


def _solve(pruners: list[SlimGPT], tokens: list[int], count: int, settings: PruningSettings) -> PruneResult:
    """Prune one expert after another."""
    results, columns = [], pruners[0].columns
    for index, pruner in enumerate(pruners):
        if not tokens[index]:
            # Without tokens all columns weigh the same.
            pruner.hessian.fill_diagonal_(1)
        damping = max(settings.percdamp, UNDER_CALIBRATED_PERCDAMP) if tokens[index] < columns else settings.percdamp
        results.append(settings.struct_prune(pruner, count, percdamp=damping))
        pruner.release()
    return PruneResult(
        pruned_units=[index * columns + unit for index, result in enumerate(results) for unit in result.pruned_units],
        kept_units=[index * columns + unit for index, result in enumerate(results) for unit in result.kept_units],
        error_uncompensated=sum(result.error_uncompensated for result in results) / len(results),
        error_compensated=sum(result.error_compensated for result in results) / len(results),
        percdamp=max(result.percdamp for result in results),
        solve_dtype=_all_names(result.solve_dtype for result in results),
        solve_device=_all_names(result.solve_device for result in results),
    )


def _all_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
