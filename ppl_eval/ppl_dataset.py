"""Evaluation text cut into non-overlapping windows."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

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


def load_eval_tokens(spec: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (n,) of an evaluation text, documents joined by blank lines.

    The tokenizer's own special tokens are added, once at the start of the text, as in the published tables.

    Raises:
        UserError: if the text cannot be read.
    """
    name, path = parse_eval_dataset(spec)
    documents = file_documents(path) if path else hub_documents(name, EVAL_SPLITS[name])
    return tokenize(tokenizer, join_documents(documents), add_special_tokens=True)


def eval_windows(tokens: Tensor, seq_len: int, source: str, flag: str = "--eval_seqlens") -> Tensor:
    """Non-overlapping windows (count, seq_len, given as ``flag``) of ``tokens`` (n,); the tail is dropped.

    Raises:
        UserError: if there is not one whole window.
    """
    count = len(tokens) // seq_len
    if count == 0:
        raise UserError(f"{source}: {len(tokens)} tokens are less than one window of {seq_len} ({flag})")
    return tokens[: count * seq_len].view(count, seq_len)


def load_eval_sets(
    specs: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlens: list[int] | None,
    max_positions: int,
    seqlen_flags: Mapping[int, str] = MappingProxyType({}),
) -> EvalSets:
    """Windows (count, seqlen) by name and window length, to be read before long work that they must not fail after.

    Args:
        specs: ``NAME``, ``FILE`` or ``NAME=FILE`` each.
        tokenizer: the model's.
        seqlens: window lengths; ``None`` for those of ``DEFAULT_EVAL_SEQLENS`` that the model has positions for.
        max_positions: of the model.
        seqlen_flags: what gave a window length, where it was not ``--eval_seqlens``.

    Raises:
        UserError: if a text cannot be read, or is shorter than one window, or a window is longer than the model's.
    """
    windows = {}
    for name, spec in name_eval_sets(specs).items():
        tokens = load_eval_tokens(spec, tokenizer)
        for seqlen in seqlens or DEFAULT_EVAL_SEQLENS:
            flag = seqlen_flags.get(seqlen, "--eval_seqlens")
            if seqlen <= max_positions:
                windows[name, seqlen] = eval_windows(tokens, seqlen, name, flag)
            elif seqlens:
                raise UserError(f"{flag} {seqlen}: the model has {max_positions} positions")
            else:
                logger.warning("no perplexity at seqlen %d: the model has %d positions", seqlen, max_positions)
    return windows
