"""Routers of mixtures of experts: a masked router chooses among the experts that are kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from models.family import Family


def active_experts(config: PreTrainedConfig, family: Family, num_experts: int) -> int | list[int]:
    """Return the number of experts of a token once ``num_experts`` are left, by layer where ``config`` lists it."""
    active = getattr(config, family.active_experts_key)
    most = _most_active(num_experts, family.num_expert_groups(config), getattr(config, "topk_group", None))
    return [min(k, most) for k in active] if isinstance(active, list) else min(active, most)


def _most_active(num_experts: int, groups: int, chosen_groups: int | None) -> int:
    """Experts that a token can be routed to: those of the groups that are chosen for it."""
    return num_experts // groups * (chosen_groups or groups)


def active_by_layer(config: PreTrainedConfig) -> list[int]:
    """Return the number of experts that a token is routed to in every layer; 1 without experts."""
    active = getattr(config, FAMILIES[config.model_type].active_experts_key, None) or 1
    return active if isinstance(active, list) else [active] * config.num_hidden_layers


@dataclass(frozen=True)
class Router:
    """The router of a layer.

    Attributes:
        module: with ``top_k``, or a configuration with ``active_key``. Its forward returns logits (tokens, experts),
            weights (tokens, k) and indices (tokens, k); or weights of all experts (tokens, experts), 0 for those not
            chosen, and logits.
        tensors: its parameters and buffers with an entry per expert, and the dimension of these entries.
        active_key: configuration key of the number of experts of a token.
    """

    module: nn.Module
    tensors: tuple[tuple[str, int], ...] = (("weight", 0),)
    active_key: str = "num_experts_per_tok"

    @classmethod
    def of(cls, layer: nn.Module, family: Family) -> Router:
        """Return the router of a layer."""
        return cls(layer.get_submodule(family.router), family.router_tensors, family.active_experts_key)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts (tokens, k) of the tokens (tokens, hidden), and their weights (tokens, k)."""
        outputs = self.module(hidden)
        if len(outputs) == 3:
            return outputs[2], outputs[1]
        weights, logits = outputs
        top_k: Any = self.module.top_k
        chosen = logits.topk(top_k, dim=-1).indices
        return chosen, weights.gather(1, chosen)

    @property
    def num_groups(self) -> int:
        """Groups of as many experts that the router chooses among; 1 without groups."""
        return getattr(self.module, "num_group", None) or 1

    def mask(self, kept: list[int]) -> None:
        """Make the router choose among the experts ``kept``, in place, as with logits of −inf for all others.

        Its weights, outputs and the numbers of the experts stay as they are; with fewer than ``top_k`` experts, every
        token gets all of them. A mask takes the place of an earlier one.

        Args:
            kept: ascending numbers of experts; all of them for no mask.

        Raises:
            ValueError: if the groups of the router would have different numbers of experts.
        """
        groups = [expert * self.num_groups // self._num_experts for expert in kept]
        if len({groups.count(group) for group in range(self.num_groups)}) > 1:
            raise ValueError(f"{self.num_groups} groups with different numbers of experts")
        self.module.__dict__.pop("forward", None)
        if len(kept) < self._num_experts:
            self.module.forward = partial(self._route_to, kept)

    @property
    def _num_experts(self) -> int:
        name, dim = self.tensors[0]
        return self.module.get_parameter(name).shape[dim]

    def _route_to(self, kept: list[int], hidden: Tensor) -> tuple[Tensor, ...]:
        """The forward with the entries of the experts ``kept`` alone, in the numbers of all experts."""
        experts = torch.tensor(kept, device=hidden.device)
        reduced: Any = _copied(self.module)
        del reduced.forward
        for name, dim in self.tensors:
            owner, _, last = name.rpartition(".")
            module = reduced.get_submodule(owner)
            value = getattr(module, last).index_select(dim, experts)
            if last in module._parameters:
                module._parameters[last] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[last] = value
        reduced.num_experts = len(kept)
        if hasattr(reduced, "top_k"):
            most = _most_active(len(kept), self.num_groups, getattr(reduced, "topk_group", None))
            reduced.top_k = min(reduced.top_k, most)
        else:
            reduced.config = copy.copy(reduced.config)
            setattr(reduced.config, self.active_key, min(getattr(reduced.config, self.active_key), len(kept)))

        def of_all(values: Tensor, others: float) -> Tensor:
            return values.new_full((len(values), self._num_experts), others).index_copy(1, experts, values)

        # Not a call, which would run the hooks of the router on these outputs.
        outputs = reduced.forward(hidden)
        if len(outputs) == 3:
            logits, weights, indices = outputs
            return of_all(logits, -torch.inf), weights, experts[indices]
        weights, logits = outputs
        return of_all(weights, 0.0), of_all(logits, -torch.inf)


def _copied(module: nn.Module) -> nn.Module:
    """A copy of ``module`` and its submodules that shares their tensors."""
    copied = copy.copy(module)
    copied._parameters, copied._buffers = module._parameters.copy(), module._buffers.copy()
    copied._modules = {name: child and _copied(child) for name, child in module._modules.items()}
    return copied
