"""Calibration samples: random windows of tokens, the same on every machine for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slim_utils.common.bos import calibration_bos, with_bos
from slim_utils.common.errors import UserError
from slim_utils.text_source import (
    CALIBRATION_DATASETS,
    file_documents,
    hub_documents,
    join_documents,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# English has about four characters a token: four times the text asked for leaves the windows room to differ.
CHARS_PER_TOKEN_ASKED = 16
# Tokens of a window that stands for the beginning of a text.
START_TOKENS = 8
# A corpus up to this size is used whole.
WHOLE_CORPUS_CHARS = 1 << 24


@dataclass(frozen=True)
class CalibrationSource:
    """A text that calibration samples are drawn from.

    Attributes:
        name: of the data set, or path of the file.
        num_tokens: tokens of the text.
        num_samples: windows drawn from it.
    """

    name: str
    num_tokens: int
    num_samples: int


@dataclass(frozen=True)
class CalibrationData:
    """Calibration samples and what identifies them.

    Attributes:
        samples: (num_samples, seqlen) int64 token ids.
        sources: the texts they were drawn from.
        bos: whether every sample begins with the tokenizer's BOS.
        sha256: of the samples as little-endian int64.
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
        """One line: samples, texts, and how windows begin."""
        count, seqlen = self.samples.shape
        first = "a BOS" if self.bos else "text"
        return f"calibration: {count} × {seqlen} tokens of {self.source}, windows begin with {first} (--bos)"


def load_calibration(
    texts: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seqlen: int,
    seed: int,
    bos: str = "auto",
) -> CalibrationData:
    """Read as much text as the windows need, tokenise it without special tokens and draw random windows.

    Args:
        texts: local files (see ``file_documents``) and names of ``CALIBRATION_DATASETS``. Several give equally many
            windows each, the first ones one more where the number does not divide, in turns.
        tokenizer: the model's.
        num_samples: windows to draw.
        seqlen: tokens of a window, its BOS included.
        seed: of the draw.
        bos: whether every window begins with a BOS, one of ``BOS_POLICIES``.

    Raises:
        UserError: if a text cannot be read or has fewer tokens than its windows ask for, or there are fewer windows
            than texts.
    """
    if num_samples < len(texts):
        raise UserError(f"--num_samples {num_samples}: fewer than the {len(texts)} calibration texts")
    bos_id = calibration_bos(tokenizer, bos)
    sources, draws = [], []
    for index, text in enumerate(texts):
        count = num_samples // len(texts) + (index < num_samples % len(texts))
        tokens = tokenize(tokenizer, calibration_text(text, count * seqlen), add_special_tokens=False)
        sources.append(CalibrationSource(str(text), len(tokens), count))
        draws.append(random_windows(tokens, count, seqlen, seed, str(text)))
    # In turns, so that the first few samples are of all texts too.
    turns = [window for turn in zip_longest(*draws) for window in turn if window is not None]
    samples = with_bos(torch.stack(turns), bos_id)
    digest = hashlib.sha256(samples.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationData(samples, sources, bos_id is not None, digest)


def calibration_text(text: str | Path, num_tokens: int) -> str:
    """Text of a local file or, where there is no such file, of a data set, enough to draw ``num_tokens`` from.

    Raises:
        UserError: if it cannot be read.
    """
    asked_chars = CHARS_PER_TOKEN_ASKED * num_tokens
    if Path(text).is_file() or text not in CALIBRATION_DATASETS:
        return join_documents(file_documents(Path(text)), max(asked_chars, WHOLE_CORPUS_CHARS))
    # wikitext2 is small, and the original draws from all of it; the others are streamed as far as needed.
    return join_documents(hub_documents(text, "train"), None if text == "wikitext2" else asked_chars)


def random_windows(tokens: Tensor, num_samples: int, seqlen: int, seed: int, source: str) -> Tensor:
    """``num_samples`` windows (num_samples, seqlen) of ``tokens`` (n,) at random starts.

    Raises:
        UserError: if ``tokens`` are fewer than the windows ask for.
    """
    needed = max(num_samples * seqlen, seqlen + 1)
    if len(tokens) < needed:
        raise UserError(
            f"{source}: {len(tokens)} tokens, but --num_samples {num_samples} × --seqlen {seqlen} ask for {needed}; "
            "lower one of them or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seqlen, (num_samples,), generator=generator)
    return torch.stack([tokens[start : start + seqlen] for start in starts.tolist()])


def sink_windows(samples: Tensor, count: int) -> Tensor:
    """Attention-sink windows (count, 8): short windows cut from the calibration samples, evenly spread.

    Of a window a model sees one first token, and what it does with that is not what it does with others: attention
    comes back to it from everywhere (an attention sink, Xiao et al. 2023). A few dozen windows are too few examples.

    Args:
        samples: (num_samples, seqlen) token ids.
        count: of windows; as many as the samples have, where those are fewer.
    """
    length = min(START_TOKENS, samples.shape[1])
    windows = samples[:, : samples.shape[1] // length * length].reshape(-1, length)
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // max(count, 1)]
