"""Evaluation text cut into non-overlapping windows."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slim_utils.common.bos import evaluation_bos
from slim_utils.common.errors import UserError
from slim_utils.text_source import file_documents, hub_documents, join_documents, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    A file of just that name, with whatever it holds of ``=``, comes before ``NAME=FILE``.

    Raises:
        UserError: if it is neither a known name nor an existing file.
    """
    if spec in EVAL_SPLITS:
        return spec, None
    name, separator, file = spec.partition("=")
    if os.path.isfile(spec):
        return Path(spec).name, Path(spec)
    if not (separator and name and os.path.isfile(file)):
        raise UserError(f"{flag} {spec}: neither one of {', '.join(EVAL_SPLITS)} nor an existing file")
    return name, Path(file)


def split_eval_specs(text: str) -> list[str]:
    """The specs in a comma-separated list; none where it is empty or ``none``. A file may have commas in its path."""
    pieces, specs = text.split(","), []
    while pieces:
        # The longest run of pieces that is a file; a piece by itself otherwise.
        joined = [",".join(pieces[:count]).strip() for count in range(len(pieces), 1, -1)]
        spec = next(filter(_is_file_spec, joined), pieces[0].strip())
        specs += [spec] if spec and spec != "none" else []
        pieces = pieces[spec.count(",") + 1 :]
    return specs


def _is_file_spec(spec: str) -> bool:
    """Whether ``spec`` is ``FILE`` or ``NAME=FILE`` with a file that exists, and a name without commas."""
    name, _, file = spec.partition("=")
    return os.path.isfile(spec) or ("," not in name and os.path.isfile(file))


def name_eval_sets(specs: Iterable[str], flag: str = "--eval_datasets") -> dict[str, str]:
    """The specs (``NAME``, ``FILE`` or ``NAME=FILE``, given to ``flag``) by the names that they are reported under.

    Files without a ``NAME=`` that share their name, or have that of a known data set, are named with their folders.

    Raises:
        UserError: if one is neither a known name nor an existing file, or a name is given twice.
    """
    parsed = [(spec, *parse_eval_dataset(spec, flag)) for spec in specs]
    unnamed = {spec: Path(os.path.abspath(spec)).parts for spec, _, path in parsed if path == Path(spec)}
    taken = EVAL_SPLITS.keys() | {name for spec, name, _ in parsed if spec not in unnamed}
    named: dict[str, str] = {}
    for spec, name, _ in parsed:
        if spec in unnamed:
            name = _unshared_tail(unnamed[spec], unnamed.values(), taken)
        if name in named:
            raise UserError(f"{flag}: {name} is given twice; leave one out, or name files apart by NAME=FILE")
        named[name] = spec
    return named


def _unshared_tail(parts: tuple[str, ...], paths: Iterable[tuple[str, ...]], taken: Collection[str]) -> str:
    """The shortest end of the path ``parts`` that none of the other ``paths`` has and that is not ``taken``."""
    others = [other for other in paths if other != parts]
    ends = [parts[-depth:] for depth in range(1, len(parts) + 1)]
    tails = (str(Path(*end)) for end in ends if all(other[-len(end) :] != end for other in others))
    return next((tail for tail in tails if tail not in taken), str(Path(*parts)))


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


def eval_windows(
    tokens: Tensor, seq_len: int, source: str, bos: int | None = None, flag: str = "--eval_seqlens"
) -> Tensor:
    """Non-overlapping windows (count, seq_len) of ``tokens`` (n,); the tail is dropped.

    Args:
        tokens: of the text.
        seq_len: tokens of a window; all but the first are targets.
        source: what messages call the text.
        bos: the first token of every window, before ``seq_len`` − 1 of the text.
        flag: what ``seq_len`` was given as.

    Raises:
        UserError: if there is not one whole window.
    """
    length = seq_len - (bos is not None)
    count = len(tokens) // length
    if count == 0:
        raise UserError(f"{source}: {len(tokens)} tokens are less than one window of {seq_len} ({flag})")
    windows = tokens[: count * length].view(count, length)
    return windows if bos is None else torch.cat([torch.full_like(windows[:, :1], bos), windows], dim=1)


def load_eval_sets(
    specs: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlens: list[int] | None,
    max_positions: int,
    bos: str = "auto",
    seqlen_flags: Mapping[int, str] = MappingProxyType({}),
) -> EvalSets:
    """Windows (count, seqlen) by text, window length and BOS, to be read before long work.

    Args:
        specs: ``NAME``, ``FILE`` or ``NAME=FILE`` each.
        tokenizer: the model's.
        seqlens: window lengths; ``None`` for those of ``DEFAULT_EVAL_SEQLENS`` that the model has positions for.
        max_positions: of the model.
        bos: whether windows begin with a BOS, one of ``BOS_POLICIES`` (see ``evaluation_bos``).
        seqlen_flags: what gave a window length, where it was not ``--eval_seqlens``.

    Raises:
        UserError: if a text cannot be read, or is shorter than one window, or a window is longer than the model's.
    """
    windows = {}
    for name, spec in name_eval_sets(specs).items():
        variants = {first: load_eval_tokens(spec, tokenizer, first is None) for first in evaluation_bos(tokenizer, bos)}
        for seqlen in seqlens or DEFAULT_EVAL_SEQLENS:
            flag = seqlen_flags.get(seqlen, "--eval_seqlens")
            if seqlen <= max_positions:
                for first, tokens in variants.items():
                    windows[EvalKey(name, seqlen, first is not None)] = eval_windows(tokens, seqlen, name, first, flag)
            elif seqlens:
                raise UserError(f"{flag} {seqlen}: the model has {max_positions} positions")
            else:
                logger.warning("no perplexity at seqlen %d: the model has %d positions", seqlen, max_positions)
    return windows
