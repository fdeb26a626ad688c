"""Plain text for training: documents joined by EOS tokens and packed into windows in which every token is a target.

1. Stream the documents of every text.
2. Tokenise them, append an EOS token to each, and cut the stream of tokens into windows.
3. Skip windows that share a passage with the calibration samples of the model or with an evaluation text.
4. Hold out the first windows of every text; write all to an Arrow file, which is mapped and never read whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from slim_utils.common.errors import UserError
from slim_utils.common.ngrams import NgramSample
from slim_utils.text_mixture import TextSource, shares
from slim_utils.text_source import file_pieces, hub_documents, names_file
from train_utils.finetune_dataset import FinetuneData, cache_errors, fingerprint, write_cache

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FLAG = "--train_text"
WINDOWS_FILE, COUNTS_FILE = "windows.arrow", "counts.json"
# Windows of one record batch of the file.
BATCH = 256


@dataclass(frozen=True)
class TextSettings:
    """Settings that, together with texts and tokenizer, determine the windows.

    Attributes:
        length: tokens of a window, including its BOS.
        max_tokens: tokens of all training windows.
        val_windows: held-out windows.
        bos: id of the first token of every window; ``None`` for none.
        skipped_tokens: tokens of the training windows that earlier runs trained on, before those of this run.
    """

    length: int
    max_tokens: float
    val_windows: int
    bos: int | None
    skipped_tokens: float = 0

    @property
    def train_windows(self) -> int:
        """Windows to train on."""
        return max(1, int(self.max_tokens // self.length))

    @property
    def total_windows(self) -> int:
        """Windows to read: held-out ones, those of earlier runs, and those to train on."""
        return self.val_windows + int(self.skipped_tokens // self.length) + self.train_windows


@dataclass
class SourceWindows:
    """Windows of a text.

    Attributes:
        name: the text.
        wanted: windows that the mixture takes, held-out ones included.
        windows: windows taken; fewer if the text is too short.
        skipped: windows left out because of an overlap, by what they overlap with.
    """

    name: str
    wanted: int
    windows: int
    skipped: dict[str, int]


def load_text_data(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    settings: TextSettings,
    excluded: Mapping[str, NgramSample],
    cache_dir: Path | None,
) -> FinetuneData:
    """Return packed windows of a mixture of texts, and held-out windows.

    Args:
        sources: texts with their weights.
        tokenizer: tokenizer of the model.
        settings: number and length of the windows.
        excluded: samples of the texts that no window may overlap with, by their names in messages.
        cache_dir: cache of the windows; ``None`` disables it.

    Raises:
        UserError: if a text cannot be read or has no window by its weight, or no training window is left.
    """
    texts: dict[str, Any] = {"sources": [[source.name, source.weight, *_file_state(source)] for source in sources]}
    texts["excluded"] = {name: hashlib.sha256(sample.hashes.tobytes()).hexdigest() for name, sample in excluded.items()}
    key = fingerprint([texts], tokenizer, settings)
    folder = cache_dir and cache_dir / f"text-{key[:32]}"
    if folder and folder.is_dir():
        logger.info("using the windows cached in %s", folder)
        return _split(folder, settings, key)

    def write(folder: Path) -> None:
        _write_windows(folder, sources, tokenizer, settings, excluded)

    if folder and write_cache(folder, write, "windows"):
        return _split(folder, settings, key)
    # The mapped file stays readable once its name is gone.
    with tempfile.TemporaryDirectory(prefix="slimgpt-text-") as scratch:
        write(Path(scratch))
        return _split(Path(scratch), settings, key)


def _file_state(source: TextSource) -> list[int]:
    """Size and time of change of a local file; nothing for a data set on the hub."""
    path = Path(source.name).expanduser()
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def _split(folder: Path, settings: TextSettings, key: str) -> FinetuneData:
    """The windows in ``folder``: the first ones are held out, the last ones are trained on."""
    counts, windows = _read_windows(folder)
    names, skipped = [entry.name for entry in counts], sum(sum(entry.skipped.values()) for entry in counts)
    for entry in counts:
        _log_counts(entry)
    if len(windows) <= settings.val_windows:
        raise UserError(
            f"{FLAG} {' '.join(names)}: {len(windows)} windows of --max_length {settings.length}, "
            f"{settings.val_windows} of them held out; give more text, or lower --max_length or --val_dataset_size"
        )
    validation = windows.select(range(settings.val_windows)) if settings.val_windows else None
    # If the text is used up, windows of earlier runs fill the rest.
    first = max(settings.val_windows, len(windows) - settings.train_windows)
    train = windows.select(range(first, len(windows)))
    return FinetuneData(train, validation, names, skipped, key)


def _read_windows(folder: Path) -> tuple[list[SourceWindows], datasets.Dataset]:
    """What :func:`_write_windows` wrote.

    Raises:
        UserError: if a file is missing or damaged.
    """
    import datasets

    with cache_errors(folder, "windows"):
        counts = json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8"))
        return [SourceWindows(**entry) for entry in counts], datasets.Dataset.from_file(str(folder / WINDOWS_FILE))


def _log_counts(entry: SourceWindows) -> None:
    for name, count in entry.skipped.items():
        logger.warning("%s: %d windows skipped that overlap with %s", entry.name, count, name)
    if entry.windows < entry.wanted:
        logger.warning("%s: the text is used up after %d of %d windows", entry.name, entry.windows, entry.wanted)


def _write_windows(
    folder: Path,
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    settings: TextSettings,
    excluded: Mapping[str, NgramSample],
) -> None:
    """Write the windows of all texts, alternating by weight, and their numbers to ``folder``."""
    import pyarrow

    total, parts = settings.total_windows, window_counts(sources, settings)
    counts = [SourceWindows(source.name, count, 0, {}) for source, count in zip(sources, parts, strict=True)]
    streams = [_accepted(_windows(documents(entry.name), tokenizer, settings), entry, excluded) for entry in counts]
    kinds = {"input_ids": pyarrow.int32(), "attention_mask": pyarrow.int8(), "labels": pyarrow.int32()}
    schema = pyarrow.schema([(name, pyarrow.list_(kind)) for name, kind in kinds.items()])
    progress = tqdm(
        _alternating(streams, counts, sources), total=total, desc="tokenise", unit="window", disable=None, leave=False
    )
    path = str(folder / WINDOWS_FILE)
    with closing(progress), pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for rows in _batches(progress):
            ids = rows.tolist()
            writer.write_batch(pyarrow.record_batch([ids, np.ones_like(rows).tolist(), ids], schema=schema))
    (folder / COUNTS_FILE).write_text(json.dumps([asdict(entry) for entry in counts]), encoding="utf-8")


def documents(name: str) -> Iterator[str]:
    """Stream the documents of a local file or of a data set on the hub."""
    return file_pieces(Path(name).expanduser()) if names_file(name) else hub_documents(name, "train")


def window_counts(sources: Sequence[TextSource], settings: TextSettings) -> list[int]:
    """Windows that the mixture takes of each text, by their weights.

    Raises:
        UserError: if a text has none.
    """
    total = settings.total_windows
    parts = shares([source.weight for source in sources], total)
    if 0 in parts:
        name = sources[parts.index(0)].name
        raise UserError(f"{FLAG} {name}: none of {total} windows by its weight; raise it, or --max_train_tokens")
    return parts


def check_texts(sources: Sequence[TextSource], settings: TextSettings) -> None:
    """Check that every text has windows by its weight and can be read, by its first document.

    Raises:
        UserError: if one has no window, cannot be read, or has no documents.
    """
    window_counts(sources, settings)
    for source in sources:
        if next(documents(source.name), None) is None:
            raise UserError(f"{FLAG} {source.name}: no text in it")


def _windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, settings: TextSettings) -> Iterator[np.ndarray]:
    """Windows (length,) int32 of the tokens of ``texts``, each followed by an EOS token; the rest is dropped."""
    first = [] if settings.bos is None else [settings.bos]
    step, buffer = settings.length - len(first), []
    for text in texts:
        buffer += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        buffer.append(tokenizer.eos_token_id)
        stop = len(buffer) // step * step
        for start in range(0, stop, step):
            yield np.array(first + buffer[start : start + step], dtype=np.int32)
        buffer = buffer[stop:]


def _accepted(
    windows: Iterable[np.ndarray], entry: SourceWindows, excluded: Mapping[str, NgramSample]
) -> Iterator[np.ndarray]:
    """The first ``entry.wanted`` of ``windows`` without overlap; counts them and the skipped ones in ``entry``."""
    for window in windows:
        if entry.windows == entry.wanted:
            return
        overlap = next((name for name, sample in excluded.items() if sample.overlaps(window)), None)
        if overlap is None:
            entry.windows += 1
            yield window
        else:
            entry.skipped[overlap] = entry.skipped.get(overlap, 0) + 1


def _alternating(
    streams: Sequence[Iterator[np.ndarray]], counts: Sequence[SourceWindows], sources: Sequence[TextSource]
) -> Iterator[np.ndarray]:
    """The windows of all texts by weight: the first ones are a sample of the mixture, the same ones for every total."""
    alive = dict(enumerate(streams))
    while alive:
        index = min(alive, key=lambda index: (counts[index].windows + 1) / sources[index].weight)
        window = next(alive[index], None)
        if window is None:
            del alive[index]
        else:
            yield window


def _batches(windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stacks (count, length) of up to ``BATCH`` windows."""
    rows: list[np.ndarray] = []
    for window in windows:
        rows.append(window)
        if len(rows) == BATCH:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)
