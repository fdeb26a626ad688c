"""Pruning of MoE layers whose weights are 3-D parameters; each expert is pruned on the tokens routed to it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.family import PLAIN_LAYOUT, ExpertLayout
from slim_utils.families import Family
from slim_utils.layerwise.distributed import SINGLE_PROCESS, ProcessGroup
from slim_utils.layerwise.output_maps import UnitMap
from slim_utils.slimgpt import PruneResult, SlimGPT

logger = logging.getLogger(__name__)

# Damping of an expert with too few tokens: the identity weighs as much as its Hessian.
UNDER_CALIBRATED_PERCDAMP = 1.0


@dataclass(frozen=True)
class Experts:
    """The 3-D parameters of the experts of a layer, whatever their layout.

    Attributes:
        module: with ``gate_up_proj``, or ``up_proj`` without gates, ``down_proj`` and, where gates are not interleaved,
            ``act_fn``; it may have ``gate_up_proj_bias`` and ``down_proj_bias``.
        layout: of its parameters.
        inputs: module that computes their inputs from those of the router, if they differ.
    """

    module: nn.Module
    layout: ExpertLayout = PLAIN_LAYOUT
    inputs: nn.Module | None = None

    @classmethod
    def of(cls, layer: nn.Module, family: Family) -> "Experts":
        """Return the experts of a layer."""
        inputs = layer.get_submodule(family.experts_in) if family.experts_in else None
        return cls(layer.get_submodule(family.experts), family.expert_layout, inputs)

    @property
    def down_proj(self) -> Tensor:
        """The down projections (experts, outputs, columns), a view of the parameter; outputs are latents or hidden."""
        weight = self.module.get_parameter("down_proj").data
        return weight.transpose(1, 2) if self.layout.transposed else weight

    def activations(self, index: int, hidden: Tensor) -> Tensor:
        """Outputs (tokens, columns) of the activation, gated or not, of expert ``index`` on (tokens, hidden).

        Args:
            index: of the expert.
            hidden: inputs of the router.
        """
        if self.inputs is not None:
            hidden = self.inputs(hidden)
        weight = self.module.get_parameter(self.layout.columns_in)[index]
        gate_up = functional.linear(hidden, weight.T if self.layout.transposed else weight)
        if hasattr(self.module, "gate_up_proj_bias"):
            gate_up = gate_up + self.module.get_parameter("gate_up_proj_bias")[index]
        if self.layout.interleaved:
            apply_gate: Any = self.module._apply_gate
            return apply_gate(gate_up)
        activation = self.module.get_submodule("act_fn")
        if not self.layout.gated:
            return activation(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens that are routed to one expert.

    Attributes:
        token: (n,) their indices.
        inputs: (n, columns) inputs of the down projection ``W``, scaled by the router's weights, so that ``W x`` is
            the expert's contribution to the layer's output, but for a bias.
        bias: (n, outputs) the contribution of its bias; ``None`` without one.
    """

    token: Tensor
    inputs: Tensor
    bias: Tensor | None


def expert_linear(experts: Experts, index: int) -> nn.Linear:
    """Down projection of one expert; its weight (outputs, columns) is a view of that slice of ``experts.down_proj``."""
    weight = experts.down_proj[index]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def expert_inputs(
    experts: Experts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Inputs (routed tokens, columns) of the down projection of every expert, see :class:`RoutedTokens`.

    Args:
        experts: of the layer.
        hidden: (tokens, hidden) inputs of the router.
        top_k_index: (tokens, k) experts that each token is routed to.
        top_k_weights: (tokens, k) weights of the router.
    """
    for index in top_k_index.unique().tolist():
        yield index, tokens_of_expert(experts, index, hidden, top_k_index, top_k_weights).inputs


def tokens_of_expert(
    experts: Experts, index: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> RoutedTokens:
    """Tokens that are routed to expert ``index``; arguments as of :func:`expert_inputs`."""
    token, place = torch.where(top_k_index == index)
    routed, gates = hidden[token], top_k_weights[token, place, None]
    if experts.layout.gate_on_inputs:
        inputs = experts.activations(index, routed * gates)
    else:
        inputs = experts.activations(index, routed) * gates
    has_bias = hasattr(experts.module, "down_proj_bias")
    return RoutedTokens(
        token, inputs, experts.module.get_parameter("down_proj_bias")[index] * gates if has_bias else None
    )


def expert_maps(
    experts: Experts,
    name: str,
    calls: Iterable[tuple[Tensor, Tensor, Tensor]],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> list[UnitMap]:
    """Return the down projections of all experts with the Hessians of their own tokens.

    An under-calibrated expert, with fewer tokens than columns, is logged and needs a damping of at least
    ``UNDER_CALIBRATED_PERCDAMP``; an expert without tokens loses the columns of least magnitude.

    Args:
        experts: of the layer.
        name: their name in messages.
        calls: inputs of the experts and their routing, as of :func:`expert_inputs`, batch by batch.
        processes: processes that share the calibration samples.
    """
    num_experts, _, columns = experts.down_proj.shape
    pruners = [SlimGPT(expert_linear(experts, index), f"{name} {index}") for index in range(num_experts)]
    counts = torch.zeros(num_experts, device=experts.down_proj.device)
    for call in calls:
        for index, inputs in expert_inputs(experts, *call):
            pruners[index].add_batch(inputs)
            counts[index] += len(inputs)
    processes.all_reduce(counts)
    for pruner in pruners:
        pruner.all_reduce_hessian(processes.all_reduce)
        if not pruner.num_samples:
            # Without tokens all columns weigh the same.
            pruner.hessian.fill_diagonal_(1)
    tokens = [int(count) for count in counts.tolist()]
    under_calibrated = [index for index in range(num_experts) if tokens[index] < columns]
    if under_calibrated:
        seen = ", ".join(f"{index} ({tokens[index]})" for index in under_calibrated)
        message = "%s: under-calibrated, fewer tokens than the %d columns: experts %s; percdamp raised to %g; raise "
        logger.warning(message + "--num_samples", name, columns, seen, UNDER_CALIBRATED_PERCDAMP)
    return [
        UnitMap(pruner, least_percdamp=UNDER_CALIBRATED_PERCDAMP if count < columns else 0.0)
        for pruner, count in zip(pruners, tokens, strict=True)
    ]


def result_of_experts(results: Sequence[PruneResult]) -> PruneResult:
    """Return the results of all experts as one.

    Units are numbered through all experts; errors are means over the experts, and the damping is the largest.
    """
    columns = len(results[0].pruned_units) + len(results[0].kept_units)
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
