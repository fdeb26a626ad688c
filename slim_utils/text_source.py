"""Text of data sets on the hub and of local files, streamed as far as needed.

Local files are read without type inference, which turns dates into timestamps, ``NA`` into null, and texts of a column
with a number in it into other types.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from slim_utils.common.errors import UserError, error_reason, row_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_DATASETS = ("wikitext2", "c4", "alpaca", "gpt4_alpaca")
DOCUMENT_SEPARATOR = "\n\n"

# Hub locations of the data sets; all are plain files without loading script. PTB is the parquet conversion by the hub.
HUB_SOURCES: dict[str, dict[str, str]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "ptb": {
        "path": "parquet",
        "data_files": "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/validation/0000.parquet",
    },
    "c4": {"path": "json", "data_files": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz"},
    "alpaca": {"path": "yahma/alpaca-cleaned"},
    "gpt4_alpaca": {"path": "vicgalle/alpaca-gpt4"},
}
Row = dict[str, Any]
FILE_KINDS = "txt, json, jsonl, csv, tsv (each also .gz or .zst) or parquet"
# Characters of plain text that :func:`file_pieces` reads at once.
PIECE_CHARS = 1 << 20
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def names_file(source: str) -> bool:
    """Return whether ``source`` is a local file, or is spelled like one; otherwise it is the name of a data set."""
    if Path(source).expanduser().is_file():
        return True
    return source not in HUB_SOURCES and bool(Path(source).suffix or source.startswith((".", "/", "~")))


def hub_datasets(names: Iterable[str]) -> list[str]:
    """Return the hub names of the data sets in ``names``; local files and data sets read as single files have none."""
    paths = [HUB_SOURCES.get(name, {}).get("path", "") for name in names]
    return [path for path in paths if "/" in path]


def hub_documents(name: str, split: str) -> Iterator[str]:
    """Stream the documents of a data set on the hub (see ``hub_rows``)."""
    return _documents(hub_rows(name, split), f"data set '{name}'")


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Stream the rows of a data set on the hub.

    Args:
        name: a key of ``HUB_SOURCES``, or the hub name of a data set.
        split: split of the data set; sources given as files have only ``"train"``.

    Raises:
        UserError: at the first row, if the hub cannot be reached.
    """
    import datasets

    source = HUB_SOURCES.get(name, {"path": name})
    try:
        yield from datasets.load_dataset(**source, split=split, streaming=True)
    except Exception as error:
        # The hub clients raise a dozen unrelated classes for the same failure.
        if (advice := cache_advice(error)) is not None:
            raise UserError(f"data set '{name}': {advice}") from error
        raise UserError(
            f"data set '{name}' could not be read from the hub ({error_reason(error)}); give a local file "
            "instead: --data_file FILE for calibration, --data_path or --train_text FILE for training, "
            f"--eval_datasets or --extra_val_set {name}=FILE (or "
            "--skip_evaluate) for evaluation"
        ) from error


def cache_advice(error: BaseException) -> str | None:
    """Return the advice for an unwritable cache of the libraries; ``None`` for any other error."""
    if not isinstance(error, PermissionError):
        return None
    return f"the cache of downloads cannot be written ({error_reason(error)}); set HF_HOME to a folder that can"


def file_documents(path: Path) -> Iterator[str]:
    """Stream the documents of a local file.

    csv, tsv, json, jsonl (also compressed) and parquet have one document per row, in a column ``text`` or ``sentence``,
    or in the columns ``instruction``, ``input``, ``output``. Any other file is one document of UTF-8 text.

    Raises:
        UserError: if the file is missing or unreadable, has none of these columns, or a value in them is not text.
    """
    return _documents(file_rows(path), str(path))


def file_pieces(path: Path) -> Iterator[str]:
    """Stream the documents of a local file, see :func:`file_documents`; plain text in pieces that end at a line's end.

    Raises:
        UserError: as :func:`file_documents`.
    """
    return _documents(file_rows(path, PIECE_CHARS), str(path))


def file_rows(path: Path, piece_chars: int | None = None) -> Iterator[Row]:
    """Stream the rows of a local csv, tsv, json, jsonl or parquet file; any other file is one row with a ``text``.

    Text files are UTF-8, with or without a byte-order mark, and may be compressed by gzip or zstd.

    Args:
        path: the file.
        piece_chars: characters after which the row of plain text ends with its line, and another one begins.

    Raises:
        UserError: if the file is missing or unreadable.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file (--data_file, --data_path, --train_text, --eval_datasets, --extra_val_set)"
        )
    read, newline = _reader(path, piece_chars)
    try:
        with _decompressed(path) as file:
            # pyarrow reads bytes, the other readers text.
            yield from read(file if read is _parquet_rows else io.TextIOWrapper(file, "utf-8-sig", newline=newline))
    except Exception as error:
        # The parsers and decompressors raise unrelated classes of errors.
        raise UserError(f"{path}: cannot be read as {FILE_KINDS} ({error_reason(error)})") from error


def _reader(path: Path, piece_chars: int | None) -> tuple[Callable[[Any], Iterator[Row]], str | None]:
    """Return the row reader for the suffix of ``path``, and the ``newline`` argument that it needs."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in (".csv", ".tsv"):
        return partial(_table_rows, delimiter="\t" if kind == ".tsv" else ","), ""
    readers: dict[str, Callable[[Any], Iterator[Row]]] = {
        ".json": _json_rows,
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
    }
    return readers.get(kind, partial(_text_rows, piece_chars=piece_chars)), None


def _decompressed(path: Path) -> io.BufferedIOBase:
    """Open ``path`` decompressed, by its magic number: downloads may be decompressed in spite of their suffix."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_GZIP_MAGIC):
        return gzip.open(path)
    if magic != _ZSTD_MAGIC:
        return path.open("rb")
    import pyarrow

    return pyarrow.input_stream(path, compression="zstd")


def _text_rows(file: IO[str], piece_chars: int | None) -> Iterator[Row]:
    if piece_chars is None:
        yield {"text": file.read()}
        return
    while lines := file.readlines(piece_chars):
        yield {"text": "".join(lines)}


def _table_rows(file: IO[str], delimiter: str) -> Iterator[Row]:
    """Yield the rows of a table with a header; all values are text."""
    csv.field_size_limit(sys.maxsize)
    for index, row in enumerate(csv.DictReader(file, delimiter=delimiter, strict=True)):
        if None in row:
            raise ValueError(f"row {index} has more cells than the header; quote cells that hold the separator")
        yield row


def _json_rows(file: IO[str]) -> Iterator[Row]:
    """Yield the rows of a file with an object per line, one list of objects, or one object."""
    lines = (line for line in file if line.strip())
    head = next(lines, "[]")
    try:
        first = json.loads(head)
    except ValueError:
        first = json.loads(head + file.read())
    rows = first if isinstance(first, list) else itertools.chain([first], _json_lines(lines))
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} is {type(row).__name__}, not an object with columns")
        yield row


def _json_lines(lines: Iterator[str]) -> Iterator[Any]:
    for index, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error


def _parquet_rows(file: BinaryIO) -> Iterator[Row]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def _documents(rows: Iterable[Row], source: str) -> Iterator[str]:
    """Yield the texts of ``rows``; errors name the ``source`` and the row."""
    for index, row in enumerate(rows):
        with row_errors(source, index):
            text = row_text(row)
        yield text


def row_text(row: Row) -> str:
    """Return the text of a row: instruction, input and output, newline-joined, or else ``text`` or ``sentence``.

    The ``text`` of an instruction data set, which repeats the three in a prompt template, is ignored.

    Raises:
        UserError: if there is none of these columns, or a value is not text, naming the column.
    """
    if "instruction" in row and "output" in row:
        return "\n".join(instruction_columns(row).values())
    column = first_filled(row, ("text", "sentence"))
    if column is None:
        raise UserError(f"no column text, sentence or instruction/output among: {', '.join(row)}")
    return text_value(row, column)


def first_filled(row: Row, columns: Iterable[str]) -> str | None:
    """Return the first of ``columns`` with a value in ``row``, else the first that it has, else ``None``.

    Readers fill columns that a row lacks with null.
    """
    present = [column for column in columns if column in row]
    return next((column for column in present if row[column] is not None), present[0] if present else None)


def instruction_columns(row: Row) -> dict[str, str]:
    """Return the columns ``instruction``, ``input`` and ``output``; a missing or null ``input`` is empty.

    Raises:
        UserError: if a value is not text, naming the column.
    """
    filled = row | {"input": "" if row.get("input") is None else row["input"]}
    return {column: text_value(filled, column) for column in ("instruction", "input", "output")}


def text_value(row: Row, column: str) -> str:
    """Return the text in ``column``.

    Raises:
        UserError: if the value is not text, or has a lone surrogate, which no tokenizer reads.
    """
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{column} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{column} is not text (a lone surrogate, as left by cutting an escaped character)") from None
    return value


def join_documents(documents: Iterable[str], max_chars: int | None = None) -> str:
    """Join documents by blank lines, up to ``max_chars`` characters, without reading further documents."""
    texts, size = [], 0
    for document in documents:
        texts.append(document)
        size += len(document) + len(DOCUMENT_SEPARATOR)
        if max_chars is not None and size >= max_chars:
            break
    text = DOCUMENT_SEPARATOR.join(texts)
    return text if max_chars is None else text[:max_chars]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Tensor:
    """Return the (n,) int64 token ids of ``text`` on the CPU, tokenised in one call."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt", verbose=False)
    return encoded.input_ids[0]
