"""Routers of mixtures of experts: a masked router chooses among the experts that are kept."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

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

    def selected(tensor: Tensor | None) -> Tensor | None:
        return tensor[rows] if tensor is not None and tensor.shape[:1] == (num_experts,) else tensor

    reduced = copy.copy(router)
    del reduced.forward
    reduced._parameters = {
        name: None if value is None else nn.Parameter(selected(value), requires_grad=False)
        for name, value in router._parameters.items()
    }
    reduced._buffers = {name: selected(value) for name, value in router._buffers.items()}
    reduced.num_experts, reduced.top_k = len(kept), min(router.top_k, len(kept))
    logits, weights, indices = reduced(hidden)
    all_logits = logits.new_full((len(logits), num_experts), -torch.inf)
    all_logits[:, rows] = logits
    return all_logits, weights, rows[indices]
