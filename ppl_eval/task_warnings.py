"""Warnings of lm-eval, logged once per kind instead of once per prompt."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# Logged per task instead (truncation), or expected: --num_fewshot, and a model object as argument.
_HIDDEN = (
    "Combined length of context",
    "Left truncation applied",
    "Overwriting default num_fewshot",
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
)
_MAX_LENGTH = 300


def warn_if_examples_overlap(name: str, task: Any) -> None:
    """Warn if the few-shot examples of the task ``name`` come from its evaluated split."""
    split = examples_split(task)
    eval_split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    if split is not None and split == eval_split:
        message = "%s: the few-shot examples come from the evaluated split (%s); put %s/train.jsonl in --data_dir"
        logger.warning(message, name, split, name)


def examples_split(task: Any) -> str | None:
    """Split that the few-shot examples of ``task`` are drawn from; ``None`` if its definition lists them."""
    settings = getattr(task, "fewshot_cfg", None)
    if settings is not None and (settings.split is not None or settings.samples is not None):
        return settings.split
    for has_rows, split in (
        (task.has_training_docs(), task.config.training_split),
        (task.has_validation_docs(), task.config.validation_split),
    ):
        if has_rows:
            return split
    return task.config.test_split


class _OnceHandler(logging.Handler):
    """Forward the records of lm-eval to the root logger; each kind of warning once, on one line."""

    def __init__(self) -> None:
        super().__init__()
        self._logged_kinds: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            text = record.getMessage()
            kind = re.sub(r"\d+", "#", text.partition("\n")[0])
            if kind in self._logged_kinds or text.startswith(_HIDDEN):
                return
            self._logged_kinds.add(kind)
            record.msg, record.args = f"lm-eval: {' '.join(text.split())[:_MAX_LENGTH]}", None
        logging.getLogger().handle(record)


@contextmanager
def package_log(level: int) -> Iterator[None]:
    """Log lm-eval's messages of ``level`` and above within the context, each kind of warning once."""
    package, handler = logging.getLogger("lm_eval"), _OnceHandler()
    before = package.level, package.propagate
    package.setLevel(level)
    package.propagate = False
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = before
