"""Instruction data for fine-tuning: rows, prompts, masked labels, the split, and the cache of tokenised samples."""

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
# What a folder answers that belongs to someone else, or lies on a read-only disk, or below a file.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
Sample = dict[str, list[int]]


@dataclass(frozen=True)
class SampleSettings:
    """What decides, beside rows and tokenizer, how a row becomes a sample.

    Attributes:
        template: a name of ``TEMPLATES``.
        max_length: tokens of a sample; longer ones are cut at their end.
        train_full_prompt: whether the prompt's tokens are targets too.
    """

    template: str
    max_length: int
    train_full_prompt: bool = False


@dataclass(frozen=True)
class FinetuneData:
    """Tokenised samples, split, and what identifies them.

    Attributes:
        train: rows of ``input_ids``, ``attention_mask``, ``labels``.
        validation: the same of the held-out rows; ``None`` where none were asked for.
        source: file or hub name.
        num_dropped: rows with an empty answer, or one that the cut left no token of.
        sha256: of rows, tokenizer and settings.
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
        train_data: a name of ``HUB_SOURCES``; not read where ``data_path`` is given.
        data_path: a file (see ``file_rows``), or a hub name.
        tokenizer: the model's.
        settings: prompts and lengths.
        val_size: rows to hold out, drawn with ``SPLIT_SEED``.
        cache_dir: where tokenised samples are kept and looked for; ``None`` for nowhere.

    Raises:
        UserError: if the data cannot be read, or leaves nothing to train on.
    """
    source = data_path or train_data
    rows = instruction_rows(source)
    answered = [row for row in rows if row["output"].strip()]
    key = fingerprint(answered, tokenizer, settings)
    samples = cached_samples(cache_dir and cache_dir / f"finetune-{key[:32]}", answered, tokenizer, settings)
    unanswered, cut = len(rows) - len(answered), len(answered) - len(samples)
    if len(samples) == 0:
        reasons = [f"{unanswered} {'has' if unanswered == 1 else 'have'} an empty answer"] if unanswered else []
        whose = "has no token of its answer" if cut == 1 else "have no token of their answer"
        reasons += [f"{cut} {whose} within --max_length {settings.max_length}"] if cut else []
        raise UserError(f"{source}: no sample is left of {len(rows)} rows{': ' if reasons else ''}{', '.join(reasons)}")
    if unanswered:
        logger.warning("%d of %d rows dropped: their answer is empty", unanswered, len(rows))
    if cut:
        logger.warning(
            "%d of %d rows dropped: --max_length %d leaves no token of their answer",
            cut,
            len(rows),
            settings.max_length,
        )
    if len(samples) <= val_size:
        raise UserError(f"{source}: {len(samples)} samples, {val_size} of them held out; lower --val_dataset_size")
    dropped = unanswered + cut
    if val_size == 0:
        return FinetuneData(samples, None, source, dropped, key)
    split = samples.train_test_split(test_size=val_size, shuffle=True, seed=SPLIT_SEED, load_from_cache_file=False)
    return FinetuneData(split["train"], split["test"], source, dropped, key)


def instruction_rows(source: str) -> list[Row]:
    """Rows with ``instruction``, ``input`` and ``output`` of a file, a known data set, or a hub name.

    Raises:
        UserError: if there is no such data, or rows lack these columns or are no text.
    """
    if source not in HUB_SOURCES and (Path(source).suffix or source.startswith((".", "/", "~"))):
        found: Iterable[Row] = file_rows(Path(source).expanduser())
    else:
        found = file_rows(Path(source)) if Path(source).is_file() else hub_rows(source, "train")
    return [check_row(row, index, source) for index, row in enumerate(found)]


def check_row(row: Row, index: int, source: str) -> Row:
    """The three columns of ``row``, a missing ``input`` as empty text.

    Raises:
        UserError: naming the row.
    """
    if not {"instruction", "output"} <= row.keys():
        raise UserError(f"{source}: row {index} has no columns instruction and output, but: {', '.join(row)}")
    try:
        return instruction_columns(row)
    except UserError as error:
        raise UserError(f"{source}: row {index}: {error}") from None


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> Sample | None:
    """One sample: prompt and answer, the prompt's labels ``IGNORED_LABEL`` unless ``train_full_prompt``.

    The tokenizer's own special tokens are added as it does, and its end-of-sequence token where the sample is shorter
    than ``max_length``. The prompt ends where the tokens of prompt and answer together stop being those of the prompt
    alone, so that no token of the answer is ever masked.

    Returns:
        ``None`` if the cut leaves no token of the answer to predict.
    """
    template = TEMPLATES[settings.template]
    if template is None:
        prompt, text = chat_texts(tokenizer, row["instruction"], row["input"], row["output"])
    else:
        prompt = template.prompt(row["instruction"], row["input"])
        text = prompt + row["output"]
    # A chat template writes the special tokens itself.
    special = settings.template != CHAT
    prompt_ids = tokenizer(prompt, add_special_tokens=special, verbose=False).input_ids
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))
    ids = ids[: settings.max_length]
    # The first token is nobody's target.
    if not any(position > 0 for position in range(shared, len(ids))):
        return None
    if special and len(ids) < settings.max_length and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    masked = 0 if settings.train_full_prompt else shared
    labels = [IGNORED_LABEL] * masked + ids[masked:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def fingerprint(rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> str:
    """sha256 of all that the samples depend on."""
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
    """The samples of ``rows``: from ``folder`` where they are there, else made, and kept there (Arrow and json)."""
    import datasets

    if folder is not None and folder.is_dir():
        logger.info("tokenised samples of %s", folder)
        return datasets.load_from_disk(str(folder))
    progress = tqdm(rows, desc="tokenise", unit="row", disable=None, leave=False)
    samples = [sample for row in progress if (sample := encode(row, tokenizer, settings)) is not None]
    made = datasets.Dataset.from_list(samples)
    if folder is not None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as partial:
                made.save_to_disk(str(partial))
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            logger.warning(
                "the tokenised samples are not kept for the next run (%s); choose another --cache_dir", error
            )
    return made


def default_cache_dir() -> Path:
    """``$SLIMGPT_CACHE``, or ``~/.cache/slimgpt``."""
    return Path(os.environ.get("SLIMGPT_CACHE") or Path.home() / ".cache" / "slimgpt")


def window_dataset(windows: Tensor) -> datasets.Dataset:
    """Windows (count, seqlen) of plain text as evaluation samples whose every token is a target."""
    import datasets

    ids = windows.tolist()
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "attention_mask": torch.ones_like(windows).tolist(), "labels": ids}
    )
