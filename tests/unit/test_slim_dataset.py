"""Calibration windows: seeded, streamed, and refused when the text is too short."""

import gzip
import json

import datasets
import pandas
import pytest
import torch

from slim_utils import slim_dataset
from slim_utils.common.errors import UserError
from slim_utils.slim_dataset import load_calibration, random_windows, sink_windows
from slim_utils.text_source import file_documents, hub_documents, join_documents
from tests.conftest import random_text

ALPACA_ROWS = [
    {"instruction": "w3 w4", "input": "", "output": "w5"},
    {"instruction": "w6", "input": "w7", "output": "w8"},
]
ALPACA_TEXTS = ["w3 w4\n\nw5", "w6\nw7\nw8"]
TEXT_ROWS = [{"text": "w3 w4"}, {"text": "w5"}]


def test_windows_are_the_same_everywhere():
    tokens = torch.arange(10_000)
    windows = random_windows(tokens, 4, 8, seed=0, source="x")
    assert windows[:, 0].tolist() == [3260, 6863, 4269, 6952]
    assert torch.equal(windows - windows[:, :1], torch.arange(8).expand(4, 8))
    assert not torch.equal(windows, random_windows(tokens, 4, 8, seed=1, source="x"))


def test_four_draws_of_eight_are_one_draw_of_thirty_two():
    generator = torch.Generator().manual_seed(0)
    starts = torch.cat([torch.randint(0, 5000 - 16, (8,), generator=generator) for _ in range(4)])
    assert random_windows(torch.arange(5000), 32, 16, 0, "x")[:, 0].tolist() == starts.tolist()


def test_too_little_text_says_both_numbers(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(random_text(100))
    with pytest.raises(UserError, match=r"100 tokens.*--num_samples 8 × --seqlen 16 need 128"):
        load_calibration([path], tokenizer, 8, 16, 0)


def test_one_window_of_the_whole_text_is_refused():
    with pytest.raises(UserError, match="16 tokens"):
        random_windows(torch.arange(16), 1, 16, 0, "x")


def test_no_special_tokens_in_calibration(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(random_text(500))
    data = load_calibration([path], tokenizer, 4, 32, 0)
    assert data.samples.shape == (4, 32)
    assert data.samples.min() >= 3
    assert data.num_tokens == 500


def write_rows(path, rows):
    """Rows in the format of the file's ending."""
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
def test_every_kind_of_file(tmp_path, ending, rows, texts):
    path = tmp_path / f"data.{ending}"
    write_rows(path, rows)
    assert list(file_documents(path)) == texts


def test_text_file_is_one_document(tmp_path):
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
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(file_documents(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(file_documents(tmp_path / "none.txt"))


@pytest.fixture
def hub(monkeypatch):
    """A hub whose every data set is 200,000 documents of 100 words; counts what is read and how it is asked for."""
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
def test_the_hub_is_streamed_only_as_far_as_needed(hub, tokenizer, name):
    data = load_calibration([name], tokenizer, 8, 64, 0)
    assert data.samples.shape == (8, 64)
    assert hub["calls"][0]["streaming"] is True
    assert hub["read"] < 50


def test_hub_windows_follow_the_seed(hub, tokenizer):
    first, again, other = (load_calibration(["c4"], tokenizer, 8, 64, seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256


def test_no_loading_script_is_asked_for(hub):
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


def test_unreachable_hub_names_the_way_out(monkeypatch):
    def load_dataset(**kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data set 'c4'.*--data_file FILE") as error:
        next(hub_documents("c4", "train"))
    assert "\n" not in str(error.value)


def test_join_stops_at_the_budget():
    taken = []

    def documents():
        for index in range(100):
            taken.append(index)
            yield "x" * 10

    assert len(join_documents(documents(), 25)) == 25
    assert len(taken) == 3
    assert join_documents(["a", "b"]) == "a\n\nb"


def test_beginnings_of_text_are_the_samples_own_tokens():
    samples = torch.arange(3 * 37).view(3, 37)
    starts = sink_windows(samples, 5)
    # Four whole windows of eight tokens a sample, of which there are twelve.
    assert starts[:, 0].tolist() == [0, 16, 37, 37 + 24, 2 * 37 + 8]
    assert (starts == starts[:, :1] + torch.arange(8)).all()
    assert sink_windows(samples, 99)[:, 0].tolist() == [37 * row + 8 * at for row in range(3) for at in range(4)]
    assert sink_windows(samples[:, :4], 9).tolist() == samples[:, :4].tolist()
    assert len(sink_windows(samples, 0)) == 0


def test_calibration_with_bos_puts_it_first_in_every_window(tokenizer, bos_tokenizer, text_file):
    plain = load_calibration([text_file], tokenizer, 4, 32, 0)
    auto, never = (load_calibration([text_file], bos_tokenizer, 4, 32, 0, bos) for bos in ("auto", "never"))
    assert auto.samples[:, 0].tolist() == [bos_tokenizer.bos_token_id] * 4
    assert torch.equal(auto.samples[:, 1:], plain.samples[:, :-1])
    assert torch.equal(never.samples, plain.samples)
    assert (plain.bos, auto.bos, never.bos) == (False, True, False)
    assert torch.equal(load_calibration([text_file], tokenizer, 4, 32, 0, "always").samples, auto.samples)
    assert "windows start with a BOS" in auto.log_line()
    assert "windows start with text" in never.log_line()


def test_calibration_on_several_texts_draws_equally_many_of_each_in_turns(tokenizer, tmp_path):
    for name, word in (("a", "w5"), ("b", "w6")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 500)
    data = load_calibration([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 5, 16, 0)
    assert data.samples[:, 0].tolist() == [5, 6, 5, 6, 5]
    assert [(source.num_samples, source.num_tokens) for source in data.sources] == [(3, 500), (2, 500)]
    assert data.source == f"{tmp_path / 'a.txt'} + {tmp_path / 'b.txt'}"
    with pytest.raises(UserError, match="--num_samples 1: fewer than the 2 calibration texts"):
        load_calibration([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 1, 16, 0)


def test_calibration_on_a_file_and_a_data_set(tokenizer, text_file, monkeypatch):
    monkeypatch.setattr(slim_dataset, "hub_documents", lambda name, split: iter([random_text(300, 3)]))
    data = load_calibration([str(text_file), "wikitext2"], tokenizer, 4, 16, 0)
    assert [source.name for source in data.sources] == [str(text_file), "wikitext2"]
    assert data.num_tokens == 4300
