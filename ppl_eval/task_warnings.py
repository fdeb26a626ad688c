"""What the ``lm-eval`` package warns of, told once rather than a prompt at a time."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

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


class TruncationCountingLM(HFLM):
    """The package's model, which notes whose prompts it truncates from the left because they are too long.

    Attributes:
        truncated: indices of such rows, by task.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.truncated: dict[str, set[int]] = defaultdict(set)
        self._scored: list[Any] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The package's, whose tokens :meth:`_loglikelihood_tokens` gets in the same order."""
        self._scored = requests
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        # Windows of rolling likelihoods come without a request, and fit.
        scored, self._scored = self._scored, []
        for request, (_, context, continuation) in zip(scored, requests, strict=False):
            # The last token is only predicted.
            self._note(request, len(context) + len(continuation) - 1)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The package's, which leaves room for the tokens to generate."""
        for request in requests:
            context, settings = request.args
            room = settings.get("max_gen_toks", self.max_gen_toks)
            self._note(request, len(self.tok_encode(context)) + room)
        return super().generate_until(requests, disable_tqdm)

    def _note(self, request: Any, tokens: int) -> None:
        if tokens > self.max_length:
            self.truncated[request.task_name].add(request.doc_id)


def warn_of_truncated(lm: TruncationCountingLM, rows: dict[str, int], num_fewshot: int) -> dict[str, int]:
    """Warn, once a task, of prompts that were truncated; rows of every task that had one.

    Args:
        lm: that has answered.
        rows: of every task.
        num_fewshot: examples in a prompt.
    """
    for task, truncated in lm.truncated.items():
        advice = "; lower --num_fewshot" if num_fewshot else ""
        message = "%s: the prompts of %d of %d rows exceed the %d tokens that the model takes. Truncating them from "
        message += "the left lost their beginnings%s"
        logger.warning(message, task, len(truncated), rows[task], lm.max_length, advice)
    return {task: len(truncated) for task, truncated in lm.truncated.items()}


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
