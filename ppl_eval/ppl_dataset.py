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
# ptb is a file of its validation split; the file reader calls the only split "train".
EVAL_SPLITS = {"wikitext2": "test", "ptb": "train"}


class EvalKey(NamedTuple):
    """Name of an evaluation text, window length in tokens, and whether windows start with a BOS."""

    name: str
    seqlen: int
    bos: bool = False

    @property
    def label(self) -> str:
        """Label in tables and log lines."""
        return f"{self.name}, seqlen {self.seqlen}{', BOS' if self.bos else ''}"


EvalSets = dict[EvalKey, Tensor]


def parse_eval_dataset(spec: str, flag: str = "--eval_datasets") -> tuple[str, Path | None]:
    """Name and local file of ``spec``, which is ``NAME``, ``FILE`` or ``NAME=FILE``, given as ``flag``.

    An existing file whose path contains ``=`` takes precedence over ``NAME=FILE``.

    Raises:
        UserError: if ``spec`` is neither a known name nor an existing file.
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
    """Specs of a comma-separated list; an empty list for ``none``. Paths may contain commas."""
    pieces, specs = text.split(","), []
    while pieces:
        # The longest run of pieces that names a file, else a single piece.
        candidates = [",".join(pieces[:count]).strip() for count in range(len(pieces), 1, -1)]
        spec = next(filter(_is_file_spec, candidates), pieces[0].strip())
        specs += [spec] if spec and spec != "none" else []
        pieces = pieces[spec.count(",") + 1 :]
    return specs


def _is_file_spec(spec: str) -> bool:
    """Whether ``spec`` is ``FILE`` or ``NAME=FILE`` with an existing file and a name without commas."""
    name, _, file = spec.partition("=")
    return os.path.isfile(spec) or ("," not in name and os.path.isfile(file))


def name_eval_sets(specs: Iterable[str], flag: str = "--eval_datasets") -> dict[str, str]:
    """Specs (``NAME``, ``FILE`` or ``NAME=FILE``, given as ``flag``) by the names that they are reported under.

    Files without ``NAME=`` that share a file name, or have the name of a known data set, are named with their folders.

    Raises:
        UserError: if a spec is neither a known name nor an existing file, or a name is given twice.
    """
    parsed = [(spec, *parse_eval_dataset(spec, flag)) for spec in specs]
    unnamed = {spec: Path(os.path.abspath(spec)).parts for spec, _, path in parsed if path == Path(spec)}
    taken = EVAL_SPLITS.keys() | {name for spec, name, _ in parsed if spec not in unnamed}
    named: dict[str, str] = {}
    for spec, name, _ in parsed:
        if spec in unnamed:
            name = _unshared_tail(unnamed[spec], unnamed.values(), taken)
        if name in named:
            raise UserError(f"{flag}: {name} is given twice; leave one out, or rename a file with NAME=FILE")
        named[name] = spec
    return named


def _unshared_tail(parts: tuple[str, ...], paths: Iterable[tuple[str, ...]], taken: Collection[str]) -> str:
    """The shortest suffix of the path ``parts`` that is not a suffix of another path in ``paths`` and not ``taken``."""
    others = [other for other in paths if other != parts]
    ends = [parts[-depth:] for depth in range(1, len(parts) + 1)]
    tails = (str(Path(*end)) for end in ends if all(other[-len(end) :] != end for other in others))
    return next((tail for tail in tails if tail not in taken), str(Path(*parts)))


def load_eval_tokens(spec: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True) -> Tensor:
    """Token ids (n,) of an evaluation text, documents joined by blank lines.

    Args:
        spec: ``NAME``, ``FILE`` or ``NAME=FILE``.
        tokenizer: tokenizer of the model.
        add_special_tokens: add the special tokens of the tokenizer once around the whole text, as in published tables.

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
        tokens: token ids of the text.
        seq_len: tokens per window; all but the first are targets.
        source: name of the text in messages.
        bos: first token of every window, followed by ``seq_len`` − 1 tokens of the text.
        flag: flag that ``seq_len`` was given with.

    Raises:
        UserError: if the text is shorter than one window.
    """
    length = seq_len - (bos is not None)
    count = len(tokens) // length
    if count == 0:
        raise UserError(f"{source}: {len(tokens)} tokens are fewer than one window of {seq_len} ({flag})")
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
    """Windows (count, seqlen) by text, window length and BOS; called before any long work.

    Args:
        specs: evaluation texts, each ``NAME``, ``FILE`` or ``NAME=FILE``.
        tokenizer: tokenizer of the model.
        seqlens: window lengths; ``None`` for those of ``DEFAULT_EVAL_SEQLENS`` that fit the model's positions.
        max_positions: number of positions of the model.
        bos: whether windows start with a BOS, one of ``BOS_POLICIES`` (see ``evaluation_bos``).
        seqlen_flags: flag of a window length, if other than ``--eval_seqlens``.

    Raises:
        UserError: if a text cannot be read or is shorter than one window, or a window exceeds the model's positions.
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
