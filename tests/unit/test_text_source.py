"""Local files: tables, compression, byte-order marks, unusual paths, and values that are not text."""

import gzip
import json

import datasets
import pandas
import pyarrow
import pytest

from slim_utils.common.errors import UserError, error_reason
from slim_utils.text_source import file_documents, file_rows, hub_rows

JSONL = b'{"text": "a"}\n{"text": "b"}\n'


def compress_zstd(content: bytes) -> bytes:
    """Return a zstd frame of ``content``."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, compress_zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "byte-order mark"])
@pytest.mark.parametrize(
    ("ending", "content", "texts"),
    [
        ("txt", b"a\r\n\r\nb", ["a\n\nb"]),
        ("csv", b'id,text\n1,"a, b\n""c"""\n2,2020-01-01\n3,NA\n4,007\n', ['a, b\n"c"', "2020-01-01", "NA", "007"]),
        ("tsv", b"instruction\tinput\toutput\na, b\t\tc\nd\te\tnull\n", ["a, b\n\nc", "d\ne\nnull"]),
        ("jsonl", JSONL, ["a", "b"]),
        ("json", b'[\n {"text": "2020-01-01"},\n {"text": "b"}\n]\n', ["2020-01-01", "b"]),
        ("json", b'{\n "text": "a"\n}\n', ["a"]),
    ],
)
def test_file_documents_every_spelling_same_texts(tmp_path, pack, mark, ending, content, texts):
    path = tmp_path / f"data.{ending}{'' if pack is bytes else '.gz'}"
    path.write_bytes(pack(mark + content))
    assert list(file_documents(path)) == texts


@pytest.mark.parametrize("folder", ["run[1]", "lr=0.1", "a,b", "a::b", "what?*", ".hidden", "a b#c%20"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json.gz", "t.csv", "t.txt", "t.parquet"])
def test_file_rows_odd_characters_in_path_read(tmp_path, folder, name):
    path = tmp_path / folder / name
    path.parent.mkdir()
    if name == "t.parquet":
        pandas.DataFrame({"text": ["a", "b"]}).to_parquet(path)
    else:
        path.write_bytes({"t.jsonl": JSONL, "t.json.gz": gzip.compress(JSONL)}.get(name, b"text\na\nb\n"))
    expected = [{"text": "text\na\nb\n"}] if name == "t.txt" else [{"text": "a"}, {"text": "b"}]
    assert list(file_rows(path)) == expected


def test_file_rows_unwritable_cache_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/sys/cache")
    path = tmp_path / "t.jsonl"
    path.write_bytes(JSONL)
    assert list(file_documents(path)) == ["a", "b"]


def test_hub_rows_unwritable_cache_named(monkeypatch):
    def load_dataset(**kwargs):
        raise PermissionError(13, "Permission denied", "/sys/cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cache of downloads cannot be written \(.*'/sys/cache'\); set HF_HOME"):
        next(hub_rows("c4", "train"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 3}, "row 1: text is int, not text"),
        ({"text": ["a"]}, "row 1: text is list, not text"),
        ({"text": None}, "row 1: text is NoneType, not text"),
        ({"text": "half \ud83d"}, "row 1: text is not text .a lone surrogate"),
        ({"instruction": "a", "output": 3}, "row 1: output is int, not text"),
        ({"instruction": None, "output": "a"}, "row 1: instruction is NoneType, not text"),
        ({"instruction": "a", "input": ["b"], "output": "a"}, "row 1: input is list, not text"),
        ({"title": "a"}, "row 1: no column text, sentence or instruction/output among: title"),
        (["a"], r"cannot be read as .* \(ValueError: row 1 is list, not an object with columns\)"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_file_documents_value_not_text_row_and_column_named(tmp_path, ending, row, message):
    path = tmp_path / f"data.{ending}"
    rows = [{"text": "fine"}, row]
    path.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message) as error:
        list(file_documents(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", b"text\na\nb, c\n", "row 1 has more cells than the header; quote cells that hold the separator"),
        ("t.csv", b'text\n"a\n', "Error: unexpected end of data"),
        ("t.jsonl", JSONL + b"{not json\n", "row 2: Expecting property name"),
        ("t.jsonl.gz", gzip.compress(JSONL * 1000)[:-20], "EOFError: Compressed file ended"),
        ("t.txt", b"\xff\xfea\x00", "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0"),
        ("t.parquet", b"PAR", "ArrowInvalid: Parquet file size is 3 bytes"),
    ],
)
def test_file_rows_unreadable_file_reason_named(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as txt, json") as error:
        list(file_rows(path))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_file_documents_text_or_sentence_by_row_both_read(tmp_path):
    path = tmp_path / "t.parquet"
    pandas.DataFrame({"text": ["a", None], "sentence": [None, "b"]}).to_parquet(path)
    assert list(file_documents(path)) == ["a", "b"]


def test_error_reason_wrapped_error_names_the_cause():
    outer = RuntimeError("An error occurred while generating the dataset")
    outer.__cause__ = KeyError("label")
    assert error_reason(outer) == "KeyError: 'label'"
    assert error_reason(StopIteration()) == "StopIteration"
    assert error_reason(ValueError("first:\n  second")) == "ValueError: first: second"
