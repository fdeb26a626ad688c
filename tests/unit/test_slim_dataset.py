"""Calibration samples: seeded, streamed, and refused if the text is too short."""

import gzip
import json
from dataclasses import replace

import datasets
import pandas
import pytest
import torch

from slim_utils import slim_dataset
from slim_utils.common.errors import UserError
from slim_utils.slim_dataset import load_calibration, random_windows, sink_windows
from slim_utils.text_mixture import TextSource
from slim_utils.text_source import file_documents, hub_documents, join_documents
from tests.conftest import random_text

ALPACA_ROWS = [
    {"instruction": "w3 w4", "input": "", "output": "w5"},
    {"instruction": "w6", "input": "w7", "output": "w8"},
]
ALPACA_TEXTS = ["w3 w4\n\nw5", "w6\nw7\nw8"]
TEXT_ROWS = [{"text": "w3 w4"}, {"text": "w5"}]


def test_random_windows_follow_the_seed():
    tokens = torch.arange(10_000)
    windows = random_windows(tokens, 4, 8, seed=0, source="x")
    assert windows[:, 0].tolist() == [3260, 6863, 4269, 6952]
    assert torch.equal(windows - windows[:, :1], torch.arange(8).expand(4, 8))
    assert not torch.equal(windows, random_windows(tokens, 4, 8, seed=1, source="x"))


def test_random_windows_of_four_draws_equal_one_draw():
    generator = torch.Generator().manual_seed(0)
    starts = torch.cat([torch.randint(0, 5000 - 16, (8,), generator=generator) for _ in range(4)])
    assert random_windows(torch.arange(5000), 32, 16, 0, "x")[:, 0].tolist() == starts.tolist()


def test_load_calibration_too_little_text_names_both_numbers(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(random_text(100))
    with pytest.raises(UserError, match=r"100 tokens.*--num_samples 8 × --seqlen 16 need 128"):
        load_calibration([TextSource(str(path))], tokenizer, 8, 16, 0)


def test_random_windows_of_the_whole_text_is_refused():
    with pytest.raises(UserError, match="16 tokens"):
        random_windows(torch.arange(16), 1, 16, 0, "x")


def test_load_calibration_has_no_special_tokens(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(random_text(500))
    data = load_calibration([TextSource(str(path))], tokenizer, 4, 32, 0)
    assert data.samples.shape == (4, 32)
    assert data.samples.min() >= 3
    assert data.num_tokens == 500


def write_rows(path, rows):
    """Write rows in the format of the suffix."""
    if path.name.endswith(".parquet"):
        pandas.DataFrame(rows).to_parquet(path)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if path.name.endswith(".gz") else lines.encode())


@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        (TEXT_ROWS, ["w3 w4", "w5"]),
        (ALPACA_ROWS, ALPACA_TEXTS),
        ([{**row, "text": "a prompt around the three"} for row in ALPACA_ROWS], ALPACA_TEXTS),
        ([{"sentence": "w9"}], ["w9"]),
    ],
    ids=["text", "alpaca", "alpaca with text", "sentence"],
)
def test_file_documents_of_every_format(tmp_path, ending, rows, texts):
    path = tmp_path / f"data.{ending}"
    write_rows(path, rows)
    assert list(file_documents(path)) == texts


def test_file_documents_of_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text("a\n\nb\n")
    assert list(file_documents(path)) == ["a\n\nb\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"title": "x"}\n', "no column text, sentence or instruction/output among: title"),
        ("data.jsonl", b"{not json\n", "cannot be read as txt, json"),
        ("data.parquet", b"PAR", "cannot be read as"),
        ("data.json.gz", b"not gzip", "cannot be read as"),
        ("data.txt", b"\xff\xfe\x00\x81", "cannot be read as"),
    ],
)
def test_file_documents_unreadable_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(file_documents(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_file_documents_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(file_documents(tmp_path / "none.txt"))


@pytest.fixture
def hub(monkeypatch):
    """A hub whose data sets have 200,000 documents of 100 words; counts the rows read and keeps the calls."""
    state = {"read": 0, "calls": []}

    def load_dataset(**kwargs):
        state["calls"].append(kwargs)

        def rows():
            for index in range(200_000):
                state["read"] += 1
                yield {"text": random_text(100, index)}

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize("name", ["c4", "alpaca", "gpt4_alpaca"])
def test_load_calibration_streams_the_hub_as_far_as_needed(hub, tokenizer, name):
    data = load_calibration([TextSource(name)], tokenizer, 8, 64, 0)
    assert data.samples.shape == (8, 64)
    assert hub["calls"][0]["streaming"] is True
    assert hub["read"] < 50


def test_load_calibration_from_the_hub_follows_the_seed(hub, tokenizer):
    first, again, other = (load_calibration([TextSource("c4")], tokenizer, 8, 64, seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256


def test_hub_documents_need_no_loading_script(hub):
    for name, split in (("wikitext2", "test"), ("ptb", "train"), ("c4", "train")):
        next(hub_documents(name, split))
    wikitext, ptb, c4 = hub["calls"]
    assert (wikitext["path"], wikitext["name"], wikitext["split"]) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert ptb["path"] == "parquet"
    assert c4["data_files"].endswith("allenai/c4/en/c4-train.00000-of-01024.json.gz")


def test_hub_documents_unreachable_hub_names_the_flag(monkeypatch):
    def load_dataset(**kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data set 'c4'.*--data_file FILE") as error:
        next(hub_documents("c4", "train"))
    assert "\n" not in str(error.value)


def test_join_documents_stops_at_max_chars():
    read = []

    def documents():
        for index in range(100):
            read.append(index)
            yield "x" * 10

    assert len(join_documents(documents(), 25)) == 25
    assert len(read) == 3
    assert join_documents(["a", "b"]) == "a\n\nb"


def test_sink_windows_are_cut_from_the_samples():
    samples = torch.arange(3 * 37).view(3, 37)
    starts = sink_windows(samples, 5)
    # Three samples with four whole windows of eight tokens each.
    assert starts[:, 0].tolist() == [0, 16, 37, 37 + 24, 2 * 37 + 8]
    assert (starts == starts[:, :1] + torch.arange(8)).all()
    assert sink_windows(samples, 99)[:, 0].tolist() == [37 * row + 8 * at for row in range(3) for at in range(4)]
    assert sink_windows(samples[:, :4], 9).tolist() == samples[:, :4].tolist()
    assert len(sink_windows(samples, 0)) == 0


def test_load_calibration_with_bos_starts_every_window_with_it(tokenizer, bos_tokenizer, text_file):
    texts = [TextSource(str(text_file))]
    plain = load_calibration(texts, tokenizer, 4, 32, 0)
    auto, never = (load_calibration(texts, bos_tokenizer, 4, 32, 0, bos) for bos in ("auto", "never"))
    assert auto.samples[:, 0].tolist() == [bos_tokenizer.bos_token_id] * 4
    assert torch.equal(auto.samples[:, 1:], plain.samples[:, :-1])
    assert torch.equal(never.samples, plain.samples)
    assert (plain.bos, auto.bos, never.bos) == (False, True, False)
    assert torch.equal(load_calibration(texts, tokenizer, 4, 32, 0, "always").samples, auto.samples)
    assert "windows start with a BOS" in auto.log_line()
    assert "windows start with text" in never.log_line()


def test_load_calibration_of_several_texts_alternates_them(tokenizer, tmp_path):
    for name, word in (("a", "w5"), ("b", "w6")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 500)
    texts = [TextSource(f"{tmp_path}/{name}.txt") for name in ("a", "b")]
    data = load_calibration(texts, tokenizer, 5, 16, 0)
    assert data.samples[:, 0].tolist() == [5, 6, 5, 6, 5]
    assert [(source.num_samples, source.num_tokens) for source in data.sources] == [(3, 500), (2, 500)]
    assert data.source == f"{tmp_path / 'a.txt'} + {tmp_path / 'b.txt'}"
    with pytest.raises(UserError, match=r"--num_samples 1: no sample of .*b.txt by its weight; raise it"):
        load_calibration(texts, tokenizer, 1, 16, 0)


def test_load_calibration_of_weighted_texts_draws_in_proportion(tokenizer, tmp_path):
    for name, word in (("a", "w5"), ("b", "w6")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 500)
    texts = [TextSource(f"{tmp_path}/a.txt", 0.75), TextSource(f"{tmp_path}/b.txt", 0.25)]
    data = load_calibration(texts, tokenizer, 8, 16, 0)
    assert data.samples[:, 0].tolist() == [5, 5, 6, 5, 5, 5, 6, 5]
    assert [source.num_samples for source in data.sources] == [6, 2]
    # The samples of a text do not depend on the others.
    alone = load_calibration(texts[:1], tokenizer, 6, 16, 0)
    assert torch.equal(data.samples[data.samples[:, 0] == 5], alone.samples)
    with pytest.raises(UserError, match=r"--num_samples 8: no sample of .*b.txt by its weight"):
        load_calibration([replace(texts[0], weight=100), replace(texts[1], weight=1)], tokenizer, 8, 16, 0)


def test_load_calibration_of_a_file_and_a_data_set(tokenizer, text_file, monkeypatch):
    monkeypatch.setattr(slim_dataset, "hub_documents", lambda name, split: iter([random_text(300, 3)]))
    data = load_calibration([TextSource(str(text_file)), TextSource("wikitext2")], tokenizer, 4, 16, 0)
    assert [source.name for source in data.sources] == [str(text_file), "wikitext2"]
    assert data.num_tokens == 4300
