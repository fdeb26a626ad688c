"""Overlap of token windows by their n-grams."""

import numpy as np
import pytest
import torch

from slim_utils.common import ngrams
from slim_utils.common.ngrams import NGRAM, NgramSample, sampled_hashes


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 50_000, (count,), generator=torch.Generator().manual_seed(seed))


def test_overlaps_of_a_shared_passage_at_any_offset_is_true():
    text = tokens(4096, 0)
    sample = NgramSample.of_windows([text.view(8, 512)])
    for start in (0, 100, 511, 2000):
        window = torch.cat([tokens(200, start + 1), text[start : start + 480], tokens(50, start + 2)])
        assert sample.overlaps(window.numpy())


def test_overlaps_of_other_text_is_false():
    sample = NgramSample.of_windows([tokens(65_536, 0).view(128, 512)])
    assert not any(sample.overlaps(window.numpy()) for window in tokens(65_536, 1).view(128, 512))
    # The same tokens in another order have other n-grams.
    assert not sample.overlaps(tokens(512, 0).flip(0).numpy())


def test_sampled_hashes_are_a_share_of_the_n_grams():
    text = tokens(100_000, 3).numpy()
    share = len(sampled_hashes(text)) / (len(text) - NGRAM + 1)
    assert share == pytest.approx(1 / ngrams.SAMPLED, rel=0.1)
    assert len(sampled_hashes(text[: NGRAM - 1])) == 0


def test_sampled_hashes_match_the_definition(monkeypatch):
    monkeypatch.setattr(ngrams, "SAMPLED", 1)
    window, mask = [7, 0, 49_151, *range(40)], 2**64 - 1
    expected = []
    for start in range(len(window) - NGRAM + 1):
        value = sum((window[start + i] + 1) * pow(0x9E3779B97F4A7C15, i + 1, 2**64) for i in range(NGRAM)) & mask
        expected.append((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & mask)
    assert sampled_hashes(np.array(window)).tolist() == expected


def test_text_of_a_sample_gives_it_back():
    first, second = (NgramSample.of_windows([tokens(2048, seed)[None]]) for seed in (0, 1))
    again = NgramSample.from_text((first | second).text)
    assert np.array_equal(again.hashes, np.union1d(first.hashes, second.hashes))
    assert again.overlaps(tokens(2048, 1).numpy())
    assert len(NgramSample.from_text(NgramSample.of_windows([]).text).hashes) == 0
