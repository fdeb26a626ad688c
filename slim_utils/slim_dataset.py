"""Calibration samples: random token windows, the same on every machine for a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slim_utils.common.bos import calibration_bos, with_bos
from slim_utils.common.errors import UserError
from slim_utils.text_mixture import TextSource, shares
from slim_utils.text_source import (
    CALIBRATION_DATASETS,
    file_documents,
    hub_documents,
    join_documents,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters read per token of a sample. English has about four per token, so the windows come from four times their
# length of text.
CHARS_PER_TOKEN = 16
# Tokens of an attention-sink window.
SINK_WINDOW_TOKENS = 8
# Local files up to this size are read whole.
WHOLE_CORPUS_CHARS = 1 << 24


@dataclass(frozen=True)
class CalibrationSource:
    """Text that calibration samples are drawn from.

    Attributes:
        name: name of the data set or path of the file.
        num_tokens: tokens of the text.
        num_samples: samples drawn from the text.
    """

    name: str
    num_tokens: int
    num_samples: int


@dataclass(frozen=True)
class CalibrationData:
    """Calibration samples and their fingerprint.

    Attributes:
        samples: (num_samples, seqlen) int64 token ids.
        sources: texts that the samples are drawn from.
        bos: whether every sample starts with a BOS.
        sha256: hash of the samples as little-endian int64.
    """

    samples: Tensor
    sources: list[CalibrationSource]
    bos: bool
    sha256: str

    @property
    def source(self) -> str:
        """Names of the texts."""
        return " + ".join(source.name for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(source.num_tokens for source in self.sources)

    def log_line(self) -> str:
        """Return a log line: number of samples, texts, and first token of the windows."""
        count, seqlen = self.samples.shape
        first = "a BOS" if self.bos else "text"
        return f"calibration: {count} × {seqlen} tokens of {self.source}, windows start with {first} (--bos)"


def load_calibration(
    texts: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seqlen: int,
    seed: int,
    bos: str = "auto",
) -> CalibrationData:
    """Return random windows of the texts, which are read as far as needed and tokenised without special tokens.

    Args:
        texts: local files (see ``file_documents``) and names of ``CALIBRATION_DATASETS``; their samples alternate in
            proportion to their weights.
        tokenizer: the model's tokenizer.
        num_samples: samples to draw.
        seqlen: tokens of a sample, including its BOS.
        seed: seed of the draw.
        bos: whether every sample starts with a BOS, one of ``BOS_POLICIES``.

    Raises:
        UserError: if a text cannot be read or has too few tokens, or has no sample by its weight.
    """
    bos_id = calibration_bos(tokenizer, bos)
    counts = shares([text.weight for text in texts], num_samples)
    if 0 in counts:
        name = texts[counts.index(0)].name
        raise UserError(f"--num_samples {num_samples}: no sample of {name} by its weight; raise it")
    sources, draws = [], []
    for text, count in zip(texts, counts, strict=True):
        tokens = tokenize(tokenizer, calibration_text(text.name, count * seqlen), add_special_tokens=False)
        sources.append(CalibrationSource(text.name, len(tokens), count))
        draws.append(random_windows(tokens, count, seqlen, seed, text.name))
    # Alternating in proportion, so that the first few samples cover all texts.
    turns = [((at + 0.5) / len(draw), window) for draw in draws for at, window in enumerate(draw)]
    samples = with_bos(torch.stack([window for _, window in sorted(turns, key=itemgetter(0))]), bos_id)
    digest = hashlib.sha256(samples.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationData(samples, sources, bos_id is not None, digest)


def calibration_text(name: str, num_tokens: int) -> str:
    """Return text of a local file or, if there is no such file, of a data set, enough to draw ``num_tokens`` from.

    Raises:
        UserError: if the text cannot be read.
    """
    max_chars = CHARS_PER_TOKEN * num_tokens
    if Path(name).is_file() or name not in CALIBRATION_DATASETS:
        return join_documents(file_documents(Path(name)), max(max_chars, WHOLE_CORPUS_CHARS))
    # wikitext2 is small, and the original draws from all of it; the other data sets are streamed as far as needed.
    return join_documents(hub_documents(name, "train"), None if name == "wikitext2" else max_chars)


def random_windows(tokens: Tensor, num_samples: int, seqlen: int, seed: int, source: str) -> Tensor:
    """Return windows (num_samples, seqlen) of ``tokens`` (n,) at random positions.

    Raises:
        UserError: if there are fewer tokens than the windows have in total.
    """
    needed = max(num_samples * seqlen, seqlen + 1)
    if len(tokens) < needed:
        raise UserError(
            f"{source}: {len(tokens)} tokens, but --num_samples {num_samples} × --seqlen {seqlen} need {needed}; "
            "lower one of the flags or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seqlen, (num_samples,), generator=generator)
    return torch.stack([tokens[start : start + seqlen] for start in starts.tolist()])


def sink_windows(samples: Tensor, count: int) -> Tensor:
    """Return attention-sink windows (count, 8): short windows cut from the calibration samples, evenly spread.

    A model treats the first token of a window unlike all others: every position attends to it (an attention sink, Xiao
    et al. 2023). A few dozen samples have too few first tokens to calibrate on.

    Args:
        samples: (num_samples, seqlen) token ids.
        count: number of windows, at most as many as the samples contain.
    """
    length = min(SINK_WINDOW_TOKENS, samples.shape[1])
    windows = samples[:, : samples.shape[1] // length * length].reshape(-1, length)
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // max(count, 1)]
