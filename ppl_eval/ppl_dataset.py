"""Evaluation text cut into non-overlapping windows."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slim_utils.bos import evaluation_bos
from slim_utils.errors import UserError
from slim_utils.text_source import file_documents, hub_documents, join_documents, tokenize

logger = logging.getLogger(__name__)

DEFAULT_EVAL_SEQLENS = (128, 2048)
# ptb is read from a file of its validation split, which a file reader calls "train".
EVAL_SPLITS = {"wikitext2": "test", "ptb": "train"}


class EvalKey(NamedTuple):
    """Name of an evaluation text, tokens of a window, and whether windows begin with a BOS."""

    name: str
    seqlen: int
    bos: bool = False

    @property
    def label(self) -> str:
        """What tables and log lines call it."""
        return f"{self.name}, seqlen {self.seqlen}{', BOS' if self.bos else ''}"


EvalSets = dict[EvalKey, Tensor]


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


def load_eval_tokens(spec: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True) -> Tensor:
    """Token ids (n,) of an evaluation text, documents joined by blank lines.

    Args:
        spec: ``NAME``, ``FILE`` or ``NAME=FILE``.
        tokenizer: the model's.
        add_special_tokens: let the tokenizer add its own, once around the whole text, as in the published tables.

    Raises:
        UserError: if the text cannot be read.
    """
    name, path = parse_eval_dataset(spec)
    documents = file_documents(path) if path else hub_documents(name, EVAL_SPLITS[name])
    return tokenize(tokenizer, join_documents(documents), add_special_tokens)


def eval_windows(tokens: Tensor, seq_len: int, source: str, bos: int | None = None) -> Tensor:
    """Non-overlapping windows (count, seq_len) of ``tokens`` (n,); the tail is dropped.

    Args:
        tokens: of the text.
        seq_len: tokens of a window; all but the first are targets.
        source: what messages call the text.
        bos: the first token of every window, before ``seq_len`` − 1 of the text.

    Raises:
        UserError: if there is not one whole window.
    """
    length = seq_len - (bos is not None)
    count = len(tokens) // length
    if count == 0:
        raise UserError(f"{source}: {len(tokens)} tokens are less than one window of {seq_len} (--eval_seqlens)")
    windows = tokens[: count * length].view(count, length)
    return windows if bos is None else torch.cat([torch.full_like(windows[:, :1], bos), windows], dim=1)


def load_eval_sets(
    specs: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlens: list[int] | None,
    max_positions: int,
    bos: str = "auto",
) -> EvalSets:
    """Windows (count, seqlen) by text, window length and BOS, to be read before long work.

    Args:
        specs: ``NAME``, ``FILE`` or ``NAME=FILE`` each.
        tokenizer: the model's.
        seqlens: window lengths; ``None`` for those of ``DEFAULT_EVAL_SEQLENS`` that the model has positions for.
        max_positions: of the model.
        bos: whether windows begin with a BOS, one of ``BOS_POLICIES`` (see ``evaluation_bos``).

    Raises:
        UserError: if a text cannot be read, or is shorter than one window, or a window is longer than the model's.
    """
    windows = {}
    for spec in specs:
        name, _ = parse_eval_dataset(spec)
        variants = {first: load_eval_tokens(spec, tokenizer, first is None) for first in evaluation_bos(tokenizer, bos)}
        for seqlen in seqlens or DEFAULT_EVAL_SEQLENS:
            if seqlen <= max_positions:
                for first, tokens in variants.items():
                    windows[EvalKey(name, seqlen, first is not None)] = eval_windows(tokens, seqlen, name, first)
            elif seqlens:
                raise UserError(f"--eval_seqlens {seqlen}: the model has {max_positions} positions")
            else:
                logger.warning("no perplexity at seqlen %d: the model has %d positions", seqlen, max_positions)
    return windows
