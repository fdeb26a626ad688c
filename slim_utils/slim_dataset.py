"""Calibration samples: random windows of tokens, the same on every machine for the same seed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slim_utils.errors import UserError
from slim_utils.text_source import file_documents, hub_documents, join_documents, tokenize

# English has about four characters a token: four times the text asked for leaves the windows room to differ.
CHARS_PER_TOKEN_ASKED = 16
# Tokens of a window that stands for the beginning of a text.
START_TOKENS = 8
# A corpus up to this size is used whole.
WHOLE_CORPUS_CHARS = 1 << 24


@dataclass(frozen=True)
class CalibrationData:
    """Calibration samples and what identifies them.

    Attributes:
        samples: (num_samples, seqlen) int64 token ids.
        source: name of the data set, or path of the file.
        num_tokens: tokens of the text the windows were drawn from.
        sha256: of the samples as little-endian int64.
    """

    samples: Tensor
    source: str
    num_tokens: int
    sha256: str


def load_calibration(
    dataset: str | None,
    data_file: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seqlen: int,
    seed: int,
) -> CalibrationData:
    """Read as much text as the windows need, tokenise it without special tokens and draw random windows.

    Args:
        dataset: a name of ``CALIBRATION_DATASETS``; not read where ``data_file`` is given.
        data_file: a local file (see ``file_documents``).
        tokenizer: the model's.
        num_samples: windows to draw.
        seqlen: tokens of a window.
        seed: of the draw.

    Raises:
        UserError: if the text cannot be read or has fewer tokens than the windows ask for.
    """
    asked_chars = CHARS_PER_TOKEN_ASKED * num_samples * seqlen
    if data_file is not None:
        source = str(data_file)
        text = join_documents(file_documents(data_file), max(asked_chars, WHOLE_CORPUS_CHARS))
    else:
        source = dataset
        # wikitext2 is small, and the original draws from all of it; the others are streamed as far as needed.
        max_chars = None if dataset == "wikitext2" else asked_chars
        text = join_documents(hub_documents(dataset, "train"), max_chars)
    tokens = tokenize(tokenizer, text, add_special_tokens=False)
    samples = random_windows(tokens, num_samples, seqlen, seed, source)
    digest = hashlib.sha256(samples.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationData(samples, source, len(tokens), digest)


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


def text_starts(samples: Tensor, count: int) -> Tensor:
    """Short windows (count, 8) of calibration samples, evenly spread: the same tokens as so many beginnings of text.

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
