"""Data for fine-tuning: rows, prompts, masked labels, validation split, cache of tokenised samples."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from slim_utils.common.atomic_output import atomic_folder
from slim_utils.common.errors import UserError, error_reason, row_errors
from slim_utils.text_source import Row, file_rows, hub_rows, instruction_columns, names_file
from train_utils.conversations import (
    MESSAGES,
    common_prefix,
    conversation_row,
    encode_conversation,
    instruction_messages,
    is_answer,
    is_conversation,
)
from train_utils.prompts import CHAT, TEMPLATES, Template

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
        template: a name of ``TEMPLATES``, for instruction rows; conversations use the tokenizer's chat template.
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
        sources: files and hub names.
        num_dropped: number of rows with an empty answer, or with no answer token left after truncation; of windows of
            text that were skipped.
        sha256: fingerprint of rows, tokenizer and settings.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    sources: list[str]
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
    """Read, tokenise and split instruction rows and conversations.

    Args:
        train_data: a name of ``HUB_SOURCES``; ignored if ``data_path`` is given.
        data_path: a file (see ``file_rows``), or a hub name.
        tokenizer: tokenizer of the model.
        settings: prompts and lengths.
        val_size: number of rows to hold out, drawn with ``SPLIT_SEED``.
        cache_dir: cache of tokenised samples; ``None`` disables it.

    Raises:
        UserError: if the data cannot be read, the tokenizer has no chat template for a conversation or it fails on it,
            or no training sample is left.
    """
    source = data_path or train_data
    rows = training_rows(source)
    check_chat_template(rows, tokenizer, settings, source)
    answered = {index: row for index, row in enumerate(rows) if has_answer(row)}
    key = fingerprint(list(answered.values()), tokenizer, settings)
    samples = cached_samples(cache_dir and cache_dir / f"finetune-{key[:32]}", answered, source, tokenizer, settings)
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
        return FinetuneData(samples, None, [source], dropped, key)
    split = samples.train_test_split(test_size=val_size, shuffle=True, seed=SPLIT_SEED, load_from_cache_file=False)
    return FinetuneData(split["train"], split["test"], [source], dropped, key)


def training_rows(source: str) -> list[Row]:
    """Instruction rows and conversations (see ``check_row``) of a file, a known data set, or a hub name.

    Raises:
        UserError: if the data cannot be read, or a row lacks its columns or has a value that is not text.
    """
    rows = file_rows(Path(source).expanduser()) if names_file(source) else hub_rows(source, "train")
    return [check_row(row, index, source) for index, row in enumerate(rows)]


def check_row(row: Row, index: int, source: str) -> Row:
    """The column ``messages`` of a conversation, or ``instruction``, ``input`` and ``output`` of any other row.

    A missing ``input`` is an empty text.

    Raises:
        UserError: naming the row.
    """
    with row_errors(source, index):
        if is_conversation(row):
            return conversation_row(row)
        if not {"instruction", "output"} <= row.keys():
            raise UserError(
                f"needs the columns instruction and output, messages, or conversations, but has: {', '.join(row)}"
            )
        return instruction_columns(row)


def check_chat_template(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: SampleSettings, source: str
) -> None:
    """Check that the tokenizer has a chat template if ``rows`` have conversations; logs where it replaces another.

    Raises:
        UserError: if it has none.
    """
    count = sum(MESSAGES in row for row in rows)
    if count and not tokenizer.chat_template:
        raise UserError(
            f"{source}: {count} of {len(rows)} rows are conversations, but the tokenizer has no chat template; set "
            "chat_template in its tokenizer_config.json"
        )
    if count and settings.template != CHAT:
        logger.info(
            "%d of %d rows are conversations: they use the tokenizer's chat template, not --prompt_template_name %s",
            count,
            len(rows),
            settings.template,
        )


def has_answer(row: Row) -> bool:
    """Whether the output of an instruction row, or an answer of a conversation, is not blank."""
    return any(map(is_answer, row[MESSAGES])) if MESSAGES in row else bool(row["output"].strip())


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings) -> Sample | None:
    """One sample of a row; labels outside of answers are ``IGNORED_LABEL`` unless ``train_full_prompt``.

    Args:
        row: result of ``check_row``.
        tokenizer: tokenizer of the model.
        settings: prompts and lengths.

    Returns:
        ``None`` if truncation leaves no answer token to predict.

    Raises:
        UserError: if the tokenizer's chat template is needed, and is missing or fails.
    """
    template = TEMPLATES[settings.template]
    if MESSAGES in row:
        ids, spans = encode_conversation(row[MESSAGES], tokenizer)
    elif template is None:
        ids, spans = encode_conversation(instruction_messages(row), tokenizer)
    else:
        ids, spans = encode_instruction(row, template, tokenizer)
    ids = ids[: settings.max_length]
    labels = [IGNORED_LABEL] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    # The first token is never a target.
    if all(label == IGNORED_LABEL for label in labels[1:]):
        return None
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": list(ids) if settings.train_full_prompt else labels,
    }


def encode_instruction(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of prompt and answer, and the span (start, end) of the answer in them.

    Special tokens are added as the tokenizer does, and its EOS token. The prompt is the longest common prefix of the
    tokens of the prompt alone and of prompt with answer, so that no answer token is masked.
    """
    prompt = template.prompt(row["instruction"], row["input"])
    prompt_ids = tokenizer(prompt, add_special_tokens=True, verbose=False).input_ids
    ids = tokenizer(prompt + row["output"], add_special_tokens=True, verbose=False).input_ids
    start = common_prefix(prompt_ids, ids)
    if start < len(ids) and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, [(start, len(ids))]


def fingerprint(rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: object) -> str:
    """sha256 of everything that the tokenised samples depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: Any = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {"eos": tokenizer.eos_token, "bos": tokenizer.bos_token, "chat_template": tokenizer.chat_template}
    digest = hashlib.sha256()
    for part in (CACHE_FORMAT, rows, vocabulary, special, vars(settings)):
        digest.update(json.dumps(part, ensure_ascii=False).encode())
    return digest.hexdigest()


def cached_samples(
    folder: Path | None,
    rows: Mapping[int, Row],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: SampleSettings,
) -> datasets.Dataset:
    """The tokenised samples of ``rows``, read from the cache ``folder``, or made and written to it (Arrow and json).

    Args:
        folder: folder of the samples; ``None`` disables the cache.
        rows: checked rows by their number in ``source``.
        source: file or hub name, for errors.
        tokenizer: tokenizer of the model.
        settings: prompts and lengths.

    Raises:
        UserError: naming the row on which the tokenizer's chat template fails, or a damaged cache.
    """
    import datasets

    if folder is not None and folder.is_dir():
        logger.info("using the tokenised samples cached in %s", folder)
        with cache_errors(folder, "tokenised samples"):
            return datasets.load_from_disk(str(folder))
    samples = []
    for index, row in tqdm(rows.items(), desc="tokenise", unit="row", disable=None, leave=False):
        with row_errors(source, index):
            sample = encode(row, tokenizer, settings)
        if sample is not None:
            samples.append(sample)
    dataset = datasets.Dataset.from_list(samples)
    if folder is not None:
        write_cache(folder, lambda partial: dataset.save_to_disk(str(partial)), "tokenised samples")
    return dataset


def write_cache(folder: Path, write: Callable[[Path], None], content: str) -> bool:
    """Fill the cache ``folder`` by ``write``; where that is impossible, log that ``content`` is not cached.

    Returns:
        Whether the cache is filled.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            write(partial)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        logger.warning("the %s are not cached (%s); choose another --cache_dir", content, error)
        return False
    return True


@contextmanager
def cache_errors(folder: Path, content: str) -> Iterator[None]:
    """Turn errors of a missing or damaged file in the cache ``folder`` of ``content`` into a :class:`UserError`."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, ArrowException) as error:
        reason = error_reason(error)
        raise UserError(f"the {content} cached in {folder} cannot be read ({reason}); remove this folder") from error


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
