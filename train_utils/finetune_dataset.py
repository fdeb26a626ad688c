"""Instruction data for fine-tuning: rows, prompts, masked labels, validation split, cache of tokenised samples."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from slim_utils.common.errors import UserError
from slim_utils.common.loading import atomic_folder
from slim_utils.text_source import HUB_SOURCES, Row, file_rows, hub_rows, instruction_columns
from train_utils.prompts import CHAT, TEMPLATES, chat_texts

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
SPLIT_SEED = 24
CACHE_FORMAT = 1
# Errors of a cache folder that is read-only, owned by another user, or below a file.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
Sample = dict[str, list[int]]


@dataclass(frozen=True)
class SampleSettings:
    """Settings that, together with the tokenizer, determine how a row becomes a sample.

    Attributes:
        template: a name of ``TEMPLATES``.
        max_length: tokens per sample; longer samples are truncated at their end.
        train_full_prompt: whether the prompt tokens are targets too.
    """

    template: str
    max_length: int
    train_full_prompt: bool = False


@dataclass(frozen=True)
class FinetuneData:
    """Tokenised train and validation samples with their fingerprint.

    Attributes:
        train: rows of ``input_ids``, ``attention_mask``, ``labels``.
        validation: the same for the held-out rows; ``None`` without held-out rows.
        source: file or hub name.
        num_dropped: number of rows with an empty answer, or with no answer token left after truncation.
        sha256: fingerprint of rows, tokenizer and settings.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    source: str
    num_dropped: int
    sha256: str


def load_finetune_data(
    train_data: str,
    data_path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: SampleSettings,
    val_size: int,
    cache_dir: Path | None,
) -> FinetuneData:
    """Read, tokenise and split instruction data.

    Args:
        train_data: a name of ``HUB_SOURCES``; ignored if ``data_path`` is given.
        data_path: a file (see ``file_rows``), or a hub name.
        tokenizer: tokenizer of the model.
        settings: prompts and lengths.
        val_size: number of rows to hold out, drawn with ``SPLIT_SEED``.
        cache_dir: cache of tokenised samples; ``None`` disables it.

    Raises:
        UserError: if the data cannot be read, or no training sample is left.
    """
    source = data_path or train_data
    rows = instruction_rows(source)
    answered = [row for row in rows if row["output"].strip()]
    key = fingerprint(answered, tokenizer, settings)
    samples = cached_samples(cache_dir and cache_dir / f"finetune-{key[:32]}", answered, tokenizer, settings)
    num_empty, num_truncated = len(rows) - len(answered), len(answered) - len(samples)
    if len(samples) == 0:
        reasons = [f"{num_empty} {'has' if num_empty == 1 else 'have'} an empty answer"] if num_empty else []
        truncation = "has no token of its answer" if num_truncated == 1 else "have no token of their answer"
        reasons += [f"{num_truncated} {truncation} within --max_length {settings.max_length}"] if num_truncated else []
        raise UserError(f"{source}: no sample is left of {len(rows)} rows{': ' if reasons else ''}{', '.join(reasons)}")
    if num_empty:
        logger.warning("%d of %d rows dropped: empty answer", num_empty, len(rows))
    if num_truncated:
        logger.warning(
            "%d of %d rows dropped: no answer token within --max_length %d",
            num_truncated,
            len(rows),
            settings.max_length,
        )
    if len(samples) <= val_size:
        raise UserError(f"{source}: {len(samples)} samples, {val_size} of them held out; lower --val_dataset_size")
    dropped = num_empty + num_truncated
    if val_size == 0:
        return FinetuneData(samples, None, source, dropped, key)
    split = samples.train_test_split(test_size=val_size, shuffle=True, seed=SPLIT_SEED, load_from_cache_file=False)
    return FinetuneData(split["train"], split["test"], source, dropped, key)


def instruction_rows(source: str) -> list[Row]:
    """Rows with ``instruction``, ``input`` and ``output`` of a file, a known data set, or a hub name.

    Raises:
        UserError: if the data cannot be read, or a row lacks one of the columns or has a value that is not text.
    """
    if source not in HUB_SOURCES and (Path(source).suffix or source.startswith((".", "/", "~"))):
        rows: Iterable[Row] = file_rows(Path(source).expanduser())
    else:
        rows = file_rows(Path(source)) if Path(source).is_file() else hub_rows(source, "train")
    return [check_row(row, index, source) for index, row in enumerate(rows)]


def check_row(row: Row, index: int, source: str) -> Row:
    """The columns ``instruction``, ``input`` and ``output`` of ``row``; a missing ``input`` is an empty text.

    Raises:
        UserError: naming the row.
    """
    if not {"instruction", "output"} <= row.keys():
        raise UserError(f"{source}: row {index} needs the columns instruction and output, but has: {', '.join(row)}")
    try:
        return instruction_columns(row)
    except UserError as error:
        raise UserError(f"{source}: row {index}: {error}") from None


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> Sample | None:
    """One sample of prompt and answer; prompt labels are ``IGNORED_LABEL`` unless ``train_full_prompt``.

    Special tokens are added as the tokenizer does, and its EOS token if the sample is shorter than ``max_length``. The
    prompt is the longest common prefix of the tokens of the prompt alone and of prompt with answer, so that no answer
    token is masked.

    Returns:
        ``None`` if truncation leaves no answer token to predict.
    """
    template = TEMPLATES[settings.template]
    if template is None:
        prompt, text = chat_texts(tokenizer, row["instruction"], row["input"], row["output"])
    else:
        prompt = template.prompt(row["instruction"], row["input"])
        text = prompt + row["output"]
    # A chat template contains the special tokens.
    special = settings.template != CHAT
    prompt_ids = tokenizer(prompt, add_special_tokens=special, verbose=False).input_ids
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    prompt_length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))
    ids = ids[: settings.max_length]
    # The first token is never a target.
    if not any(position > 0 for position in range(prompt_length, len(ids))):
        return None
    if special and len(ids) < settings.max_length and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    num_masked = 0 if settings.train_full_prompt else prompt_length
    labels = [IGNORED_LABEL] * num_masked + ids[num_masked:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def fingerprint(rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> str:
    """sha256 of everything that the tokenised samples depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: Any = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {"eos": tokenizer.eos_token, "bos": tokenizer.bos_token, "chat_template": tokenizer.chat_template}
    digest = hashlib.sha256()
    for part in (CACHE_FORMAT, rows, vocabulary, special, vars(settings)):
        digest.update(json.dumps(part, ensure_ascii=False).encode())
    return digest.hexdigest()


def cached_samples(
    folder: Path | None, rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: SampleSettings
) -> datasets.Dataset:
    """The tokenised samples of ``rows``, read from the cache ``folder``, or made and written to it (Arrow and json)."""
    import datasets

    if folder is not None and folder.is_dir():
        logger.info("using the tokenised samples cached in %s", folder)
        return datasets.load_from_disk(str(folder))
    progress = tqdm(rows, desc="tokenise", unit="row", disable=None, leave=False)
    samples = [sample for row in progress if (sample := encode(row, tokenizer, settings)) is not None]
    dataset = datasets.Dataset.from_list(samples)
    if folder is not None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as partial:
                dataset.save_to_disk(str(partial))
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            logger.warning("the tokenised samples are not cached (%s); choose another --cache_dir", error)
    return dataset


def default_cache_dir() -> Path:
    """The cache folder: ``$SLIMGPT_CACHE``, or ``~/.cache/slimgpt``."""
    return Path(os.environ.get("SLIMGPT_CACHE") or Path.home() / ".cache" / "slimgpt")


def window_dataset(windows: Tensor) -> datasets.Dataset:
    """Evaluation samples of text ``windows`` (count, seqlen); every token is a target."""
    import datasets

    ids = windows.tolist()
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "attention_mask": torch.ones_like(windows).tolist(), "labels": ids}
    )
