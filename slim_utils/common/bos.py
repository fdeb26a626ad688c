"""Whether windows of plain text start with the tokenizer's BOS token.

A model trained with a BOS before every text has its attention sink there. Windows without a BOS calibrate and evaluate
such a model in a state that never occurs in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS_POLICIES = ("auto", "always", "never")
BOS_CHOICES = "auto (if the tokenizer adds one), always or never (default: auto)"
BOS_HELP = "start text windows with a BOS: " + BOS_CHOICES

# Id of the single space mark in the 32,000 tokens of LLaMA 1 and 2 (Vicuna, TinyLlama, Code Llama, …) only.
_LLAMA_2_SPACE = 29871


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` prepends its BOS to a text by default."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def calibration_bos(tokenizer: PreTrainedTokenizerBase, policy: str) -> int | None:
    """BOS id at the start of every calibration window; ``None`` for windows without a BOS.

    Args:
        tokenizer: tokenizer of the model.
        policy: one of ``BOS_POLICIES``; ``auto`` uses a BOS if the tokenizer adds one by default.

    Raises:
        UserError: for ``always`` with a tokenizer that has no BOS.
    """
    if policy == "always" and tokenizer.bos_token_id is None:
        raise UserError("--bos always: the tokenizer has no BOS token; use --bos auto")
    return tokenizer.bos_token_id if policy == "always" or (policy == "auto" and adds_bos(tokenizer)) else None


def evaluation_bos(tokenizer: PreTrainedTokenizerBase, policy: str) -> list[int | None]:
    """BOS ids (or ``None``) of the variants that perplexity is measured with, the one to quote first.

    The published perplexities of LLaMA 1 and 2 were measured without a BOS: for their tokenizer, ``auto`` gives both
    variants, first the one without.

    Raises:
        UserError: as :func:`calibration_bos`.
    """
    bos = calibration_bos(tokenizer, policy)
    return [None, bos] if policy == "auto" and bos is not None and has_llama_2_vocabulary(tokenizer) else [bos]


def set_bos(tokenizer: PreTrainedTokenizerBase, policy: str) -> bool:
    """Set whether ``tokenizer`` prepends its BOS, as ``policy`` says, and return the result.

    Raises:
        UserError: as :func:`calibration_bos`.
    """
    adds = calibration_bos(tokenizer, policy) is not None
    if policy != "auto":
        tokenizer.add_bos_token = adds
    return adds


def has_llama_2_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` has the vocabulary of LLaMA 1 and 2."""
    return len(tokenizer) > _LLAMA_2_SPACE and tokenizer.convert_ids_to_tokens(_LLAMA_2_SPACE) == "▁"


def with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """``windows`` (count, seqlen) with ``bos`` prepended and the last token dropped; unchanged for ``None``."""
    if bos is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)
