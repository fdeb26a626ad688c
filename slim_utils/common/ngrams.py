"""Overlap of token windows by a sample of the hashes of their n-grams (Broder, 1997).

Windows that share a passage share its n-grams, wherever the passage starts. One in ``SAMPLED`` hashes is kept, so that
the calibration text of a model is described by a few kilobytes.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

# Tokens of an n-gram; one in so many hashes is kept.
NGRAM, SAMPLED = 16, 64
_FACTOR, _MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)


class NgramSample:
    """A sample of the n-grams of some windows.

    Args:
        hashes: (n,) sorted uint64.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes

    @classmethod
    def of_windows(cls, windows: Iterable[Tensor]) -> NgramSample:
        """Return the sample of ``windows``, each (count, seqlen) token ids."""
        hashes = [sampled_hashes(window) for batch in windows for window in batch.cpu().numpy()]
        return cls(np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64))

    @classmethod
    def from_text(cls, text: str) -> NgramSample:
        """Return the sample of which ``text`` is the :attr:`text`."""
        return cls(np.frombuffer(base64.b64decode(text), "<u8").astype(np.uint64))

    @property
    def text(self) -> str:
        """The hashes as base64 of little-endian uint64, for json."""
        return base64.b64encode(self.hashes.astype("<u8").tobytes()).decode()

    def __or__(self, other: NgramSample) -> NgramSample:
        return NgramSample(np.union1d(self.hashes, other.hashes))

    def overlaps(self, window: np.ndarray) -> bool:
        """Return whether a sampled n-gram of ``window`` (seqlen,) is in the sample."""
        hashes = sampled_hashes(window)
        places = np.searchsorted(self.hashes, hashes)
        inside = places < len(self.hashes)
        return bool((self.hashes[places[inside]] == hashes[inside]).any())


def sampled_hashes(window: np.ndarray) -> np.ndarray:
    """Return the sampled hashes (n,) uint64 of the n-grams of ``window`` (seqlen,) token ids."""
    if len(window) < NGRAM:
        return np.empty(0, np.uint64)
    powers = np.cumprod(np.full(NGRAM, _FACTOR))
    # uint64 arithmetic wraps around. Ids are shifted so that the first ones of a vocabulary differ in all bits.
    hashes = (sliding_window_view(window.astype(np.uint64) + np.uint64(1), NGRAM) * powers).sum(axis=1, dtype=np.uint64)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * _MIXER
    return hashes[(hashes >> np.uint64(32)) % np.uint64(SAMPLED) == 0]
