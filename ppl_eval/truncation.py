"""Prompts that are longer than the model takes, counted and told by task."""

import logging
from collections import defaultdict
from typing import Any

from lm_eval.models.huggingface import HFLM

logger = logging.getLogger(__name__)


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
