"""Whether windows of plain text begin with the tokenizer's BOS token.

A model that was trained with a BOS in front of every text keeps its attention sink there. Calibrated or measured on
windows without it, such a model is pruned, and judged, in a state that it never meets in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS_POLICIES = ("auto", "always", "never")
BOS_CHOICES = "auto (where the tokenizer adds one), always or never (default: auto)"
BOS_HELP = "windows of text begin with a BOS: " + BOS_CHOICES

# The id of a lone space mark in the 32,000 tokens of LLaMA 1 and 2 (Vicuna, TinyLlama, Code Llama, …), and in no other.
_LLAMA_2_SPACE = 29871


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` puts its BOS in front of a text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def calibration_bos(tokenizer: PreTrainedTokenizerBase, policy: str) -> int | None:
    """Id of the first token of every calibration window; ``None`` for windows of text alone.

    Args:
        tokenizer: the model's.
        policy: one of ``BOS_POLICIES``; ``auto`` means a BOS where the tokenizer adds one by itself.

    Raises:
        UserError: if a BOS is demanded of a tokenizer that has none.
    """
    if policy == "always" and tokenizer.bos_token_id is None:
        raise UserError("--bos always: the tokenizer has no BOS token; use --bos auto")
    return tokenizer.bos_token_id if policy == "always" or (policy == "auto" and adds_bos(tokenizer)) else None


def evaluation_bos(tokenizer: PreTrainedTokenizerBase, policy: str) -> list[int | None]:
    """Ids of the first tokens of the windows that perplexity is measured on, the one to quote first.

    The published tables of LLaMA 1 and 2 were measured without a BOS: for their tokenizer ``auto`` gives both, without
    it first.

    Raises:
        UserError: as :func:`calibration_bos`.
    """
    bos = calibration_bos(tokenizer, policy)
    return [None, bos] if policy == "auto" and bos is not None and has_llama_2_vocabulary(tokenizer) else [bos]


def set_bos(tokenizer: PreTrainedTokenizerBase, policy: str) -> bool:
    """Let ``tokenizer`` put its BOS in front of texts, or not, by ``policy``; whether it does.

    Raises:
        UserError: as :func:`calibration_bos`.
    """
    adds = calibration_bos(tokenizer, policy) is not None
    if policy != "auto":
        tokenizer.add_bos_token = adds
    return adds


def has_llama_2_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` is that of LLaMA 1 and 2."""
    return len(tokenizer) > _LLAMA_2_SPACE and tokenizer.convert_ids_to_tokens(_LLAMA_2_SPACE) == "▁"


def with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Windows (count, seqlen) with the token ``bos`` in front of a token of text less; as they are for ``None``."""
    if bos is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)
