"""Checks of token ids, lengths and padding against the model's configuration, before they cause index errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MAX_NAMES = 4
# Configuration keys of the number of positions; ALiBi needs none.
_POSITIONS_KEYS = ("max_position_embeddings", "max_seq_len")


def num_positions(config: PreTrainedConfig) -> int:
    """Number of positions of the model, in tokens; ``sys.maxsize`` for one without a limit."""
    text = config.get_text_config()
    return next((count for key in _POSITIONS_KEYS if (count := getattr(text, key, None))), sys.maxsize)


def check_length(length: int, config: PreTrainedConfig, flag: str) -> None:
    """Check that the model has at least ``length`` positions, the value of ``flag``.

    Raises:
        UserError: if the model has fewer positions.
    """
    positions = num_positions(config)
    if length > positions:
        raise UserError(f"{flag} {length}: the model has {positions} positions")


def check_padding_id(config: PreTrainedConfig, model_path: str) -> None:
    """Check that ``pad_token_id`` is a row of the embeddings; negative ids count from the end.

    Raises:
        UserError: if it is not a row, in which case the model could not be built.
    """
    text = config.get_text_config()
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise UserError(
            f"model {model_path}: pad_token_id {padding} in config.json, but vocab_size is {rows}; set pad_token_id to "
            "null or to a token of the model"
        )


def check_token_ids(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *samples: Tensor | Iterable[list[int]]
) -> None:
    """Check that the model has an embedding for every token of ``samples``.

    Tokens of the tokenizer without an embedding that no sample uses, such as an added ``[PAD]``, are logged.

    Args:
        config: configuration of the model.
        tokenizer: tokenizer that produced the samples.
        samples: token ids, each a tensor of any shape or a list of rows.

    Raises:
        UserError: naming the highest token id without an embedding.
    """
    rows = config.get_text_config().vocab_size
    max_id = max((_max_id(ids) for ids in samples), default=-1)
    if max_id >= rows:
        raise UserError(_no_embedding(max_id, rows, f" ({tokenizer.convert_ids_to_tokens(max_id)!r})"))
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:_MAX_NAMES])
        logger.warning(
            "%d tokens of the tokenizer (%s) have no embedding in the model, which has %d rows; the samples do not use "
            "them, but texts that do cannot be used",
            len(beyond),
            names,
            rows,
        )


def guard_token_ids(model: PreTrainedModel) -> None:
    """Add a hook to the embeddings of ``model`` that raises :class:`UserError` for token ids without a row.

    Used where a package tokenises the texts; without the hook, a GPU fails with a device-side assertion.
    """

    def check(module: nn.Embedding, inputs: tuple[Any, ...]) -> None:
        rows = module.weight.shape[0]
        if inputs[0].numel() and (max_id := int(inputs[0].max())) >= rows:
            raise UserError(_no_embedding(max_id, rows))

    model.get_input_embeddings().register_forward_pre_hook(check)


def set_padding_token(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Set a padding token of ``tokenizer`` that has an embedding in the model; any will do, since it is masked."""
    rows, token = config.get_text_config().vocab_size, tokenizer.pad_token
    if token is not None and tokenizer.pad_token_id < rows:
        return
    candidates = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
    tokenizer.pad_token = next(
        name for name in candidates if name is not None and tokenizer.convert_tokens_to_ids(name) < rows
    )
    if token is not None:
        logger.info(
            "the padding token %r has no embedding in the model, which has %d rows; padding with %r instead",
            token,
            rows,
            tokenizer.pad_token,
        )


def _max_id(ids: Tensor | Iterable[list[int]]) -> int:
    if isinstance(ids, Tensor):
        return int(ids.max()) if ids.numel() else -1
    return max((max(row, default=-1) for row in ids), default=-1)


def _no_embedding(token_id: int, rows: int, name: str = "") -> str:
    return (
        f"the tokenizer produces token {token_id}{name}, but the model has embeddings of tokens 0 to {rows - 1}: the "
        "tokenizer is not that of the model, or was extended after training; use the model's tokenizer, or resize the "
        "embeddings (resize_token_embeddings) first"
    )
