"""Routers of mixtures of experts: a masked router chooses among the experts that are kept."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def active_experts(config: PreTrainedConfig, num_experts: int) -> int:
    """Return the number of experts of a token once ``num_experts`` are left."""
    return min(config.num_experts_per_tok, num_experts)


def mask_router(router: nn.Module, kept: list[int]) -> None:
    """Make ``router`` choose among the experts ``kept``, in place, as with logits of −inf for all others.

    Its weights, outputs and the numbers of the experts stay as they are; with fewer than ``top_k`` experts, every token
    gets all of them. A mask takes the place of an earlier one.

    Args:
        router: with ``top_k``, and parameters and buffers that have a row per expert; its forward returns logits
            (tokens, experts), weights (tokens, k) and indices (tokens, k).
        kept: ascending numbers of experts; all of them for no mask.
    """
    router.__dict__.pop("forward", None)
    if len(kept) < router.get_parameter("weight").shape[0]:
        router.forward = partial(_route_to, router, kept)


def _route_to(router: nn.Module, kept: list[int], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of a router with the rows of the experts ``kept`` alone, in the numbers of all experts."""
    num_experts = router.get_parameter("weight").shape[0]
    rows = torch.tensor(kept, device=hidden.device)

    def selected(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.shape[:1] == (num_experts,) else tensor

    reduced: Any = copy.copy(router)
    del reduced.forward
    parameters = {name: nn.Parameter(selected(value), False) for name, value in router.named_parameters(recurse=False)}
    # The copy shares the dictionaries of the router, which are not changed.
    reduced._parameters = router._parameters | parameters
    reduced._buffers = router._buffers | {name: selected(value) for name, value in router.named_buffers(recurse=False)}
    reduced.num_experts, reduced.top_k = len(kept), min(reduced.top_k, len(kept))
    # Not a call, which would run the hooks of the router on these outputs.
    logits, weights, indices = reduced.forward(hidden)
    all_logits = logits.new_full((len(logits), num_experts), -torch.inf)
    all_logits[:, rows] = logits
    return all_logits, weights, rows[indices]
