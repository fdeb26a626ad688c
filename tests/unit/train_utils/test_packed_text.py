"""Packed windows of plain text: content, mixture, held-out part, overlap, cache."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from slim_utils import text_source
from slim_utils.common.errors import UserError
from slim_utils.common.ngrams import NgramSample
from slim_utils.text_mixture import TextSource
from tests.conftest import random_text
from train_utils.packed_text import TextSettings, load_text_data

EOS, BOS = 2, 1


def settings(
    length: int = 8, max_tokens: float = 1e9, val_windows: int = 0, bos: int | None = None, skipped_tokens: float = 0
) -> TextSettings:
    return TextSettings(length, max_tokens, val_windows, bos, skipped_tokens)


def write_documents(path: Path, texts: list[str]) -> TextSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(str(path), 1.0)


def load(tokenizer, *sources, cache=None, excluded=None, **options):
    return load_text_data(list(sources), tokenizer, settings(**options), excluded or {}, cache)


def test_load_text_data_windows_are_the_documents_joined_by_eos(tmp_path, tokenizer):
    texts = [random_text(count, count) for count in (3, 30, 1, 17)]
    data = load(tokenizer, write_documents(tmp_path / "a.jsonl", texts))
    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False).input_ids, EOS]]
    windows = data.train["input_ids"][:]
    assert [token for window in windows for token in window] == stream[: len(stream) // 8 * 8]
    assert data.train["labels"][:] == windows
    assert data.train["attention_mask"][:] == [[1] * 8] * len(windows)
    assert data.validation is None and data.num_dropped == 0


def test_load_text_data_with_bos_starts_every_window_with_it(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [random_text(50, 0)])
    plain, first = load(tokenizer, source, length=7), load(tokenizer, source, length=8, bos=BOS)
    assert first.train["input_ids"][:] == [[BOS, *window] for window in plain.train["input_ids"]]


def test_load_text_data_of_max_tokens_reads_no_further(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_documents(path, [random_text(9, 0)] * 10)
    path.write_text(path.read_text() + "not json\n")
    data = load(tokenizer, TextSource(str(path), 1.0), max_tokens=30, val_windows=2)
    assert len(data.train) == 3 and len(data.validation) == 2
    with pytest.raises(UserError, match="row 10"):
        load(tokenizer, TextSource(str(path), 1.0))


def test_load_text_data_of_a_mixture_alternates_by_weight(tmp_path, tokenizer):
    first = write_documents(tmp_path / "a.jsonl", ["w3 " * 400])
    second = write_documents(tmp_path / "b.jsonl", ["w4 " * 400])
    data = load(tokenizer, TextSource(first.name, 3), TextSource(second.name, 1), max_tokens=20 * 8, val_windows=4)
    kinds = [window[0] for part in (data.validation, data.train) for window in part["input_ids"]]
    assert kinds.count(3) == 18 and kinds.count(4) == 6
    # Every part of the windows is a sample of the mixture.
    assert all(abs(kinds[:count].count(3) - 0.75 * count) < 2 for count in range(25))
    assert data.sources == [first.name, second.name]


def test_load_text_data_of_skipped_tokens_goes_on_after_those_of_an_earlier_run(tmp_path, tokenizer, caplog):
    sources = [
        write_documents(tmp_path / name, [random_text(600, seed)]) for name, seed in (("a.jsonl", 0), ("b.jsonl", 1))
    ]
    sources = [TextSource(source.name, weight) for source, weight in zip(sources, (0.7, 0.3), strict=True)]
    whole = load(tokenizer, *sources, max_tokens=30 * 8, val_windows=3)
    parts = [
        load(tokenizer, *sources, max_tokens=10 * 8, val_windows=3, skipped_tokens=count * 8) for count in (0, 10, 20)
    ]
    assert [window for part in parts for window in part.train["input_ids"]] == whole.train["input_ids"][:]
    assert all(part.validation["input_ids"][:] == whole.validation["input_ids"][:] for part in parts)
    assert len({part.sha256 for part in parts}) == 3
    # Where the text is used up, its last windows are trained on.
    end = load(tokenizer, *sources, max_tokens=10 * 8, val_windows=3, skipped_tokens=1e5)
    everything = load(tokenizer, *sources, val_windows=3).train["input_ids"][:]
    assert len(end.train) == 10 and end.train["input_ids"][:] == everything[-10:]
    assert "the text is used up" in caplog.text


def test_load_text_data_of_a_short_text_goes_on_with_the_others(tmp_path, tokenizer, caplog):
    short, long = (
        write_documents(tmp_path / name, ["w3 " * count]) for name, count in (("a.jsonl", 17), ("b.jsonl", 99))
    )
    data = load(tokenizer, short, long, max_tokens=10 * 8)
    assert len(data.train) == 7
    assert f"{short.name}: the text is used up after 2 of 5 windows" in caplog.text


def test_load_text_data_without_enough_windows_is_refused(tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", ["w3 " * 17])
    with pytest.raises(UserError, match="2 windows of --max_length 8, 2 of them held out"):
        load(tokenizer, source, val_windows=2, cache=tmp_path / "cache")


def test_load_text_data_of_a_text_without_a_window_by_its_weight_is_refused(tmp_path, tokenizer):
    first, second = (write_documents(tmp_path / name, ["w3 " * 400]) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(
        UserError, match=r"--train_text .*b\.jsonl: none of 10 windows by its weight; raise it, or --max"
    ):
        load(tokenizer, TextSource(first.name, 99), second, max_tokens=10 * 8)


@pytest.mark.parametrize(("name", "content"), [("counts.json", "["), ("counts.json", "[{}]"), ("windows.arrow", "x")])
def test_load_text_data_from_a_damaged_cache_names_it(tmp_path, tokenizer, name, content):
    source, cache = write_documents(tmp_path / "a.jsonl", [random_text(90, 0)]), tmp_path / "cache"
    load(tokenizer, source, cache=cache)
    (folder,) = cache.iterdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"the windows cached in {folder} cannot be read .*; remove this folder"):
        load(tokenizer, source, cache=cache)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"the windows cached in {folder} cannot be read"):
        load(tokenizer, source, cache=cache)


def test_load_text_data_skips_windows_of_excluded_texts(tmp_path, tokenizer, caplog):
    generator = np.random.default_rng(0)
    words = [f"w{word}" for word in generator.integers(3, 64, 40 * 512)]
    source = write_documents(tmp_path / "a.jsonl", [" ".join(words)])
    everything = load(tokenizer, source, length=512)
    windows = torch.tensor(everything.train["input_ids"][:])
    # A passage that begins within window 3 and ends within window 4.
    passage = windows.flatten()[3 * 512 + 300 : 4 * 512 + 250]
    data = load(tokenizer, source, length=512, excluded={"the test": NgramSample.of_windows([passage[None]])})
    kept = data.train["input_ids"][:]
    assert kept == [window for index, window in enumerate(windows.tolist()) if index not in (3, 4)]
    assert data.num_dropped == 2
    assert "2 windows skipped that overlap with the test" in caplog.text


@pytest.mark.parametrize("compressed", [False, True])
def test_load_text_data_of_plain_text_reads_it_in_pieces(tmp_path, tokenizer, monkeypatch, compressed):
    monkeypatch.setattr(text_source, "PIECE_CHARS", 40)
    lines = [random_text(5, index) + "\n" for index in range(20)]
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    path.write_bytes(gzip.compress("".join(lines).encode()) if compressed else "".join(lines).encode())
    ids = [token for window in load(tokenizer, TextSource(str(path), 1.0)).train["input_ids"] for token in window]
    assert ids.count(EOS) > 2
    expected = tokenizer("".join(lines), add_special_tokens=False).input_ids
    words = [token for token in ids if token != EOS]
    assert words == expected[: len(words)]


def test_load_text_data_from_the_cache_gives_the_same_windows(tmp_path, tokenizer, monkeypatch):
    source, cache = write_documents(tmp_path / "a.jsonl", [random_text(90, 0)]), tmp_path / "cache"
    written = load(tokenizer, source, cache=cache, val_windows=1)
    monkeypatch.setattr("train_utils.packed_text._write_windows", None)
    cached = load(tokenizer, source, cache=cache, val_windows=1)
    assert cached.train["input_ids"][:] == written.train["input_ids"][:]
    assert cached.sha256 == written.sha256
    monkeypatch.undo()
    # A changed file, or other settings, are not in the cache.
    os.utime(source.name, ns=(1, 1))
    assert load(tokenizer, source, cache=cache, val_windows=1).sha256 != written.sha256
    assert load(tokenizer, source, cache=cache, val_windows=2).sha256 != written.sha256


def test_load_text_data_with_an_unwritable_cache_goes_on(tmp_path, tokenizer, caplog):
    source, cache = write_documents(tmp_path / "a.jsonl", [random_text(90, 0)]), tmp_path / "file"
    cache.write_text("")
    assert len(load(tokenizer, source, cache=cache).train) > 5
    assert "choose another --cache_dir" in caplog.text
