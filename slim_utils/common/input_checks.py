"""Tokens, lengths and padding held against a model's configuration, before it would look up what it does not have."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NAMED = 4


def check_length(length: int, config: PreTrainedConfig, flag: str) -> None:
    """Make sure that the model has a position for each of ``length`` tokens, the value of ``flag``.

    Raises:
        UserError: if it does not.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"{flag} {length}: the model has {positions} positions")


def check_padding_id(config: PreTrainedConfig, model_path: str) -> None:
    """Make sure that the padding id of a configuration is a row of the embeddings; negative ones count from the end.

    Raises:
        UserError: if it is not: the model could not be built.
    """
    text = config.get_text_config()
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise UserError(
            f"model {model_path}: pad_token_id {padding} in config.json, but vocab_size is {rows}: the embeddings have "
            "no such row; set it to null or to a token that the model has"
        )


def check_token_ids(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *samples: Tensor | Iterable[list[int]]
) -> None:
    """Make sure that the model has an embedding of every token of ``samples``.

    Tokens that the tokenizer has beyond that and no sample uses, such as an added ``[PAD]``, are named in the log.

    Args:
        config: the model's.
        tokenizer: what made the samples.
        samples: token ids, each a tensor of any shape or a list a row.

    Raises:
        UserError: naming the first token without one.
    """
    rows = config.get_text_config().vocab_size
    highest = max((_highest(ids) for ids in samples), default=-1)
    if highest >= rows:
        raise UserError(_no_embedding(highest, rows, f" ({tokenizer.convert_ids_to_tokens(highest)!r})"))
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:_NAMED])
        logger.warning(
            "%d tokens of the tokenizer (%s) have no embedding in the model, which has %d rows; the samples have none "
            "of them, but a text that has one cannot be used",
            len(beyond),
            names,
            rows,
        )


def guard_token_ids(model: PreTrainedModel) -> None:
    """Make the embeddings of ``model`` refuse, by a :class:`UserError`, tokens that they have no row of.

    For texts that are tokenised out of sight, by a package; without it a GPU stops at a device assertion.
    """

    def check(module: nn.Embedding, inputs: tuple[Any, ...]) -> None:
        rows = module.weight.shape[0]
        if inputs[0].numel() and (highest := int(inputs[0].max())) >= rows:
            raise UserError(_no_embedding(highest, rows))

    model.get_input_embeddings().register_forward_pre_hook(check)


def use_padding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give ``tokenizer`` a padding token that the model has an embedding of; a mask hides it, whichever it is."""
    rows, token = config.get_text_config().vocab_size, tokenizer.pad_token
    if token is not None and tokenizer.pad_token_id < rows:
        return
    candidates = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
    tokenizer.pad_token = next(
        name for name in candidates if name is not None and tokenizer.convert_tokens_to_ids(name) < rows
    )
    if token is not None:
        logger.info(
            "the padding token %r has no embedding in the model, which has %d rows; batches are padded with %r instead",
            token,
            rows,
            tokenizer.pad_token,
        )


def _highest(ids: Tensor | Iterable[list[int]]) -> int:
    if isinstance(ids, Tensor):
        return int(ids.max()) if ids.numel() else -1
    return max((max(row, default=-1) for row in ids), default=-1)


def _no_embedding(token_id: int, rows: int, name: str = "") -> str:
    return (
        f"the tokenizer gives token {token_id}{name}, but the model has embeddings of tokens 0 to {rows - 1}: it is "
        "not the model's tokenizer, or was given tokens after training; take the model's own, or enlarge the model's "
        "embeddings (resize_token_embeddings) first"
    )
