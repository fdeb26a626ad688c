"""Predictions of the teacher, computed once: the most likely tokens of every position, and the probability of the rest.

The divergence of a run is then KL(teacher ‖ student) of distributions in which all other tokens are one event. It is at
most the whole divergence, by the share of the rest times the divergence within it (chain rule of relative entropy).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slim_utils.common.errors import UserError
from train_utils.finetune_dataset import IGNORED_LABEL, cache_errors, write_cache

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

FLAG = "--cache_teacher"
CONTENT = "predictions of the teacher"
PREDICTIONS_FILE = "predictions.arrow"
POLL_SECONDS = 1.0
Batch = dict[str, Tensor]
# Divergence, summed over tokens, of the log-probabilities (tokens, vocabulary) of the targets in a slice.
Divergence = Callable[[Tensor, slice], Tensor]
# Most likely tokens and log-probabilities of all targets of a batch, as of top_log_probabilities.
TopPredictions = Callable[[Batch, int], tuple[Tensor, Tensor]]


def top_log_probabilities(log_probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most likely tokens and their log-probabilities, with that of all others as the last column.

    Args:
        log_probabilities: (targets, vocabulary), fp32.
        count: below the size of the vocabulary.

    Returns:
        (targets, count) token ids, and (targets, count + 1) in nats.
    """
    top, tokens = log_probabilities.topk(count, -1)
    return tokens, torch.cat([top, _rest(log_probabilities, tokens)], -1)


def _rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability (targets, 1) of all tokens but ``tokens``."""
    return log_probabilities.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)


def top_divergence(tokens: Tensor, target: Tensor, predicted: Tensor, chunk: slice) -> Tensor:
    """Divergence of the predictions of a chunk, in nats, summed over its positions.

    Args:
        tokens: (targets, count) ids of the teacher's most likely tokens.
        target: (targets, count + 1), the result of :func:`top_log_probabilities` of the teacher.
        predicted: log-probabilities (positions, vocabulary) of the student in ``chunk``.
        chunk: rows of ``tokens`` and ``target``.
    """
    top = tokens[chunk]
    student = torch.cat([predicted.gather(-1, top), _rest(predicted, top)], -1)
    return torch.nn.functional.kl_div(student, target[chunk], reduction="sum", log_target=True)


class CachedTeacher:
    """Teacher whose predictions for the training samples are read from a file.

    Args:
        folder: folder that :func:`cache_predictions` filled.
        count: tokens of every position.

    Raises:
        UserError: if the file is missing or damaged.
    """

    def __init__(self, folder: Path, count: int) -> None:
        import pyarrow

        self._count = count
        with cache_errors(folder, CONTENT), pyarrow.memory_map(str(folder / PREDICTIONS_FILE)) as file:
            self._table = pyarrow.ipc.open_stream(file).read_all()
        self._rows = {key: index for index, key in enumerate(self._table["key"].to_pylist())}

    def targets(self, inputs: Batch) -> Divergence:
        """The divergence from the teacher of the predictions of a batch."""
        rows = [self._rows[key] for key, _ in _samples(inputs)]
        tokens, target = (
            torch.from_numpy(np.concatenate([self._values(name, row) for row in rows])).view(-1, width)
            for name, width in (("tokens", self._count), ("log_probabilities", self._count + 1))
        )
        device = inputs["input_ids"].device
        return partial(top_divergence, tokens.to(device, torch.long), target.to(device))

    def _values(self, name: str, row: int) -> np.ndarray:
        return self._table[name][row].values.to_numpy()


def samples_hash(samples: datasets.Dataset) -> str:
    """Hash of the tokens and labels of all samples."""
    digest = hashlib.sha256()
    for row in samples.with_format("numpy", columns=["input_ids", "labels"]):
        for values in row.values():
            digest.update(np.asarray(values, dtype=np.int32).tobytes())
    return digest.hexdigest()


def wait_for_folder(folder: Path) -> None:
    """Wait until another process has filled ``folder``."""
    while not folder.is_dir():
        time.sleep(POLL_SECONDS)


def cache_predictions(
    folder: Path,
    open_teacher: Callable[[], TopPredictions],
    batches: Callable[[], Iterator[Batch]],
    num_samples: int,
    count: int,
) -> None:
    """Fill ``folder`` with the predictions of the teacher, if it does not exist.

    Args:
        folder: folder of the cache, named after what the predictions depend on.
        open_teacher: returns the predictions of the teacher.
        batches: returns the training samples, padded, on the device of the teacher.
        num_samples: number of samples, for the progress bar.
        count: tokens of every position.

    Raises:
        UserError: if the folder cannot be written.
    """
    if folder.is_dir():
        logger.info("using the predictions of the teacher cached in %s", folder)
        return

    def write(partial_folder: Path) -> None:
        with tqdm(total=num_samples, desc="teacher", unit="sample", disable=None, leave=False) as progress:
            share = _write(partial_folder / PREDICTIONS_FILE, open_teacher(), batches(), count, progress)
        logger.info("teacher: the %d most likely tokens have %.2f %% of the probability", count, 100 * share)

    if not write_cache(folder, write, CONTENT):
        raise UserError(f"{FLAG}: {folder.parent} cannot be written; choose another --cache_dir")


def _write(path: Path, top: TopPredictions, batches: Iterator[Batch], count: int, progress: Any) -> float:
    """Write the predictions for all samples; returns the mean probability of the stored tokens."""
    import pyarrow

    kinds = [("key", pyarrow.binary()), ("tokens", pyarrow.list_(pyarrow.int32()))]
    schema = pyarrow.schema([*kinds, ("log_probabilities", pyarrow.list_(pyarrow.float32()))])
    keys, stored, positions = set(), 0.0, 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for inputs in batches:
            tokens, target = top(inputs, count)
            start = 0
            for key, num_targets in _samples(inputs):
                part = slice(start, start + num_targets)
                start += num_targets
                if key not in keys:
                    keys.add(key)
                    writer.write_batch(_record(schema, key, tokens[part], target[part]))
                progress.update()
            stored, positions = stored + float(target[:, :-1].exp().sum()), positions + len(target)
    return stored / positions


def _record(schema: pyarrow.Schema, key: bytes, tokens: Tensor, target: Tensor) -> pyarrow.RecordBatch:
    import pyarrow

    columns = [pyarrow.array([key], pyarrow.binary())]
    for values, dtype in ((tokens, torch.int32), (target, torch.float32)):
        flat = values.to("cpu", dtype).flatten().numpy()
        columns.append(pyarrow.ListArray.from_arrays(np.array([0, len(flat)], dtype=np.int32), flat))
    return pyarrow.record_batch(columns, schema=schema)


def _samples(inputs: Batch) -> Iterator[tuple[bytes, int]]:
    """Key and number of targets of every sample in a padded batch; the key is a hash of its tokens and labels."""
    present = inputs["attention_mask"].bool()
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], present, strict=True):
        content = torch.stack([ids[mask], labels[mask]]).to("cpu", torch.int32).numpy().tobytes()
        yield hashlib.blake2b(content, digest_size=16).digest(), int((labels[1:] != IGNORED_LABEL).sum())
