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
        prefill_runs: seconds of the prefill, a forward over the whole prompt that fills the cache.
        decode_runs: seconds of one decoding step of the batch, as the mean over the steps of a repeat.
    """

    prefill_runs: list[float]
    decode_runs: list[float]

    @property
    def prefill_seconds(self) -> float:
        """Median seconds of the prefill."""
        return statistics.median(self.prefill_runs)

    @property
    def decode_seconds(self) -> float:
        """Median seconds of a decoding step."""
        return statistics.median(self.decode_runs)


def measure_latency(
    models: list[PreTrainedModel], batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> list[Latency]:
    """Latency of greedy generation with each model; runs alternate, so that other load affects all models equally.

    Args:
        models: models on their devices; models with the same vocabulary size get the same tokens.
        batch_size: sequences per batch.
        prompt_tokens: length of the prompts.
        new_tokens: decoding steps after the prompt.
        repeats: measured runs of each model, after ``WARM_UPS`` unmeasured ones.
    """
    timings: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(WARM_UPS + repeats):
        for model, runs in zip(models, timings, strict=True):
            runs.append(_generate_once(model, batch_size, prompt_tokens, new_tokens))
    return [Latency(*map(list, zip(*runs[WARM_UPS:], strict=True))) for runs in timings]


@torch.no_grad()
def _generate_once(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and mean seconds of a decoding step."""
    prompt = random_prompt(model, batch_size, prompt_tokens)
    start = _now(model.device)
    token, cache = greedy_step(model, prompt, None)
    prefill_end = _now(model.device)
    for _ in range(new_tokens):
        token, cache = greedy_step(model, token, cache)
    return prefill_end - start, (_now(model.device) - prefill_end) / new_tokens


def random_prompt(model: PreTrainedModel, batch_size: int, prompt_tokens: int) -> Tensor:
    """Random token ids (batch_size, prompt_tokens) on the model's device, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    return prompt.to(model.device)


def greedy_step(model: PreTrainedModel, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """The most likely next token (batch, 1) and the cache, from one forward on ``tokens`` (batch, n)."""
    # Logits of the last position only, as in generate.
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits.argmax(-1), output.past_key_values


def _now(device: torch.device) -> float:
    """Clock in seconds, read after synchronising ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
