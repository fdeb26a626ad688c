"""What the ``lm-eval`` package warns of, told once rather than a prompt at a time."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# Told by task instead, what --num_fewshot asks for, and what is meant by handing a model over.
_HIDDEN = (
    "Combined length of context",
    "Left truncation applied",
    "Overwriting default num_fewshot",
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
)
_LONGEST = 300


def warn_of_measured_examples(name: str, task: Any) -> None:
    """Warn if the few-shot examples of ``task``, called ``name``, are rows of the split that is measured."""
    split = examples_split(task)
    measured = task.config.test_split if task.has_test_docs() else task.config.validation_split
    if split is not None and split == measured:
        message = "%s: the fewshot examples come from the split that is measured (%s); put %s/train.jsonl in --data_dir"
        logger.warning(message, name, split, name)


def examples_split(task: Any) -> str | None:
    """Split that the few-shot examples of ``task`` are drawn from; ``None`` where its definition has them."""
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
    """Hands the package's records on to the root logger's handlers; of warnings one of each kind, on one line."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            text = record.getMessage()
            kind = re.sub(r"\d+", "#", text.partition("\n")[0])
            if kind in self._seen or text.startswith(_HIDDEN):
                return
            self._seen.add(kind)
            record.msg, record.args = f"lm-eval: {' '.join(text.split())[:_LONGEST]}", None
        logging.getLogger().handle(record)


@contextmanager
def package_log(show_prompts: bool) -> Iterator[None]:
    """The package's log within: its warnings, each kind once and, if ``show_prompts``, what it says besides."""
    package, handler = logging.getLogger("lm_eval"), _OnceHandler()
    before = package.level, package.propagate
    package.setLevel(logging.INFO if show_prompts else logging.WARNING)
    package.propagate = False
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = before
