"""Measured latency of prefill and decode."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

WARM_UPS = 1


@dataclass(frozen=True)
class Latency:
    """Seconds of every repeat, and their medians.

    Attributes:
        prefill_runs: forwards over the whole prompt, filling the cache.
        decode_runs: one decoding step of the whole batch, the mean over a repeat's steps.
    """

    prefill_runs: list[float]
    decode_runs: list[float]

    @property
    def prefill_seconds(self) -> float:
        """Median of the prefill."""
        return statistics.median(self.prefill_runs)

    @property
    def decode_seconds(self) -> float:
        """Median of a decoding step."""
        return statistics.median(self.decode_runs)


def measure_latency(
    models: list[PreTrainedModel], batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> list[Latency]:
    """Greedy generation timed in turns, so that whatever else the machine does falls on all models alike.

    Args:
        models: each on its device; they share a vocabulary size or each gets tokens of its own.
        batch_size: sequences at once.
        prompt_tokens: length of the prompts.
        new_tokens: decoding steps after the prompt.
        repeats: measured runs of each model, after an unmeasured one.
    """
    timings: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(WARM_UPS + repeats):
        for model, measured in zip(models, timings, strict=True):
            measured.append(_generate_once(model, batch_size, prompt_tokens, new_tokens))
    return [Latency(*map(list, zip(*measured[WARM_UPS:], strict=True))) for measured in timings]


@torch.no_grad()
def _generate_once(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of one decoding step on average."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    prompt = prompt.to(model.device)
    start = _now(model.device)
    token, cache = _step(model, prompt, None)
    prefill_end = _now(model.device)
    for _ in range(new_tokens):
        token, cache = _step(model, token, cache)
    return prefill_end - start, (_now(model.device) - prefill_end) / new_tokens


def _step(model: PreTrainedModel, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """One forward on ``tokens`` (batch, n): the likeliest next token (batch, 1), and the cache."""
    # As generate does: logits of the last position only.
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits.argmax(-1), output.past_key_values


def _now(device: torch.device) -> float:
    """Seconds on a clock that is read when ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
