"""Text of the known data sets, from the hub or from a local file, read only as far as it is needed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slim_utils.errors import UserError

CALIBRATION_DATASETS = ("wikitext2", "c4", "alpaca", "gpt4_alpaca")
DOCUMENT_SEPARATOR = "\n\n"

# Where each data set lives; all of them are plain files, no loading script. PTB is the hub's own parquet conversion.
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
_BUILDERS = {".json": "json", ".jsonl": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


def hub_dataset(name: str | None) -> str | None:
    """The hub's own name of a data set; ``None`` for a file, or where only files of it are read."""
    path = HUB_SOURCES.get(name, {}).get("path", "")
    return path if "/" in path else None


def hub_documents(name: str, split: str) -> Iterator[str]:
    """Stream the documents of a data set from the hub (see ``hub_rows``)."""
    return map(row_text, hub_rows(name, split))


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Stream the rows of a data set from the hub.

    Args:
        name: a key of ``HUB_SOURCES``, or the hub's own name of a data set.
        split: its split; a source given as files has only ``"train"``.

    Raises:
        UserError: if the hub cannot be reached, at the first row.
    """
    source = HUB_SOURCES.get(name, {"path": name})
    try:
        yield from datasets.load_dataset(**source, split=split, streaming=True)
    except Exception as error:
        # The hub's clients raise a dozen unrelated classes; to the user they all mean the same.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"data set '{name}' could not be read from the hub ({reason}); give a local file instead: --data_file FILE "
            f"for calibration, --data_path FILE for training, --eval_datasets or --extra_val_set {name}=FILE (or "
            "--skip_evaluate) for evaluation"
        ) from error


def file_documents(path: Path) -> Iterator[str]:
    """Stream the documents of a local file.

    json, jsonl (also gzipped) and parquet give a document a row: a column ``text`` or ``sentence``, or the columns
    ``instruction``, ``input``, ``output``. Any other file is one document of UTF-8 text.

    Raises:
        UserError: if the file is missing, unreadable, or has none of these columns.
    """
    for row in file_rows(path):
        try:
            text = row_text(row)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        yield text


def file_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a local json, jsonl (also gzipped) or parquet file; any other is one row with a ``text``.

    Raises:
        UserError: if the file is missing or unreadable.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (--data_file, --data_path, --eval_datasets, --extra_val_set)")
    builder = next((_BUILDERS[suffix] for suffix in _BUILDERS if path.name.lower().endswith(suffix)), None)
    try:
        if builder is None:
            yield {"text": path.read_text(encoding="utf-8")}
        else:
            yield from datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    except Exception as error:
        # Readers of json, gzip and parquet each have errors of their own.
        kinds = "txt, json, jsonl, json.gz or parquet"
        raise UserError(f"{path}: cannot be read as {kinds} ({type(error).__name__})") from error


def row_text(row: Row) -> str:
    """Text of a row: its instruction, input and output, newline-joined, or else its ``text`` or ``sentence``.

    Instruction data sets often carry a ``text`` too, with a prompt template around the three; that one is not meant.
    """
    if "instruction" in row and "output" in row:
        return "\n".join(row.get(column) or "" for column in ("instruction", "input", "output"))
    for column in ("text", "sentence"):
        if isinstance(row.get(column), str):
            return row[column]
    raise UserError(f"no column text, sentence or instruction/output among: {', '.join(row)}")


def join_documents(documents: Iterable[str], max_chars: int | None = None) -> str:
    """Documents joined by blank lines; stops after the one that reaches ``max_chars`` characters."""
    taken, size = [], 0
    for document in documents:
        taken.append(document)
        size += len(document) + len(DOCUMENT_SEPARATOR)
        if max_chars is not None and size >= max_chars:
            break
    text = DOCUMENT_SEPARATOR.join(taken)
    return text if max_chars is None else text[:max_chars]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Tensor:
    """Token ids (n,) of ``text``, in one call over the whole of it.

    Returns:
        A 1-D int64 tensor on the CPU.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt", verbose=False)
    return encoded.input_ids[0]
