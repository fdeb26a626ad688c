"""Evaluation text cut into non-overlapping windows."""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slim_utils.errors import UserError
from slim_utils.text_source import file_documents, hub_documents, join_documents, tokenize

logger = logging.getLogger(__name__)

DEFAULT_EVAL_SEQLENS = (128, 2048)
EvalSets = dict[tuple[str, int], Tensor]
# ptb is read from a file of its validation split, which a file reader calls "train".
EVAL_SPLITS = {"wikitext2": "test", "ptb": "train"}


def parse_eval_dataset(spec: str, flag: str = "--eval_datasets") -> tuple[str, Path | None]:
    """Name and local file of ``NAME``, ``FILE`` or ``NAME=FILE``, given to ``flag``.

    Raises:
        UserError: if it is neither a known name nor an existing file.
    """
    if spec in EVAL_SPLITS:
        return spec, None
    name, separator, file = spec.partition("=")
    path = Path(file if separator else spec)
    if not path.is_file():
        raise UserError(f"{flag} {spec}: neither one of {', '.join(EVAL_SPLITS)} nor an existing file")
    return (name if separator else path.name), path


def load_eval_tokens(spec: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (n,) of an evaluation text, documents joined by blank lines.

    The tokenizer's own special tokens are added, once at the start of the text, as in the published tables.

    Raises:
        UserError: if the text cannot be read.
    """
    name, path = parse_eval_dataset(spec)
    documents = file_documents(path) if path else hub_documents(name, EVAL_SPLITS[name])
    return tokenize(tokenizer, join_documents(documents), add_special_tokens=True)


def eval_windows(tokens: Tensor, seq_len: int, source: str) -> Tensor:
    """Non-overlapping windows (count, seq_len) of ``tokens`` (n,); the tail is dropped.

    Raises:
        UserError: if there is not one whole window.
    """
    count = len(tokens) // seq_len
    if count == 0:
        raise UserError(f"{source}: {len(tokens)} tokens are less than one window of {seq_len} (--eval_seqlens)")
    return tokens[: count * seq_len].view(count, seq_len)


def load_eval_sets(
    specs: Iterable[str], tokenizer: PreTrainedTokenizerBase, seqlens: list[int] | None, max_positions: int
) -> EvalSets:
    """Windows (count, seqlen) by name and window length, to be read before long work that they must not fail after.

    Args:
        specs: ``NAME``, ``FILE`` or ``NAME=FILE`` each.
        tokenizer: the model's.
        seqlens: window lengths; ``None`` for those of ``DEFAULT_EVAL_SEQLENS`` that the model has positions for.
        max_positions: of the model.

    Raises:
        UserError: if a text cannot be read, or is shorter than one window, or a window is longer than the model's.
    """
    windows = {}
    for spec in specs:
        name, _ = parse_eval_dataset(spec)
        tokens = load_eval_tokens(spec, tokenizer)
        for seqlen in seqlens or DEFAULT_EVAL_SEQLENS:
            if seqlen <= max_positions:
                windows[name, seqlen] = eval_windows(tokens, seqlen, name)
            elif seqlens:
                raise UserError(f"--eval_seqlens {seqlen}: the model has {max_positions} positions")
            else:
                logger.warning("no perplexity at seqlen %d: the model has %d positions", seqlen, max_positions)
    return windows
