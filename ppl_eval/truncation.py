"""Count and log, per task, the prompts that exceed the model's maximum length."""

import logging
from collections import defaultdict
from typing import Any

from lm_eval.models.huggingface import HFLM

logger = logging.getLogger(__name__)


class TruncationCountingLM(HFLM):
    """``HFLM`` that records the rows whose prompts are truncated from the left.

    Attributes:
        truncated: indices of these rows, by task.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.truncated: dict[str, set[int]] = defaultdict(set)
        self._scored: list[Any] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Keep the requests for :meth:`_loglikelihood_tokens`, which gets their tokens in the same order."""
        self._scored = requests
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        # Windows of rolling likelihoods have no request, and always fit.
        scored, self._scored = self._scored, []
        for request, (_, context, continuation) in zip(scored, requests, strict=False):
            # The last token is only predicted.
            self._record_if_truncated(request, len(context) + len(continuation) - 1)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Record truncated requests, then generate; ``HFLM`` reserves room for the tokens to generate."""
        for request in requests:
            context, settings = request.args
            max_new_tokens = settings.get("max_gen_toks", self.max_gen_toks)
            self._record_if_truncated(request, len(self.tok_encode(context)) + max_new_tokens)
        return super().generate_until(requests, disable_tqdm)

    def _record_if_truncated(self, request: Any, tokens: int) -> None:
        if tokens > self.max_length:
            self.truncated[request.task_name].add(request.doc_id)


def warn_about_truncation(truncated: dict[str, int], rows: dict[str, int], max_length: int, num_fewshot: int) -> None:
    """Log one warning for every task with truncated prompts.

    Args:
        truncated: number of truncated rows by task, for tasks that have any.
        rows: number of evaluated rows by task.
        max_length: maximum length of the model, in tokens.
        num_fewshot: few-shot examples per prompt.
    """
    for task, count in truncated.items():
        advice = "; lower --num_fewshot" if num_fewshot else ""
        message = "%s: the prompts of %d of %d rows exceed the model's %d tokens and were truncated from the left%s"
        logger.warning(message, task, count, rows[task], max_length, advice)
