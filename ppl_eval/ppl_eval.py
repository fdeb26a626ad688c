"""Perplexity: exp of the mean negative log-likelihood over all targets of all windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ppl_eval.ppl_dataset import EvalSets, eval_windows, load_eval_tokens, name_eval_sets
from slim_utils.common.bos import evaluation_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 4096


def ppl_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Iterable[str],
    seq_len: int = 128,
    batch_size: int = 4,
    bos: str = "auto",
) -> dict[str, float]:
    """Perplexity of ``model`` on each data set.

    Args:
        model: model on the evaluation device.
        tokenizer: tokenizer of the model.
        datasets: ``wikitext2``, ``ptb``, a file, or ``NAME=FILE``.
        seq_len: tokens per window; each window has ``seq_len − 1`` targets.
        batch_size: windows per forward.
        bos: whether windows start with a BOS, one of ``BOS_POLICIES``; without, if ``auto`` gives both variants.

    Returns:
        Perplexity by the name of the data set.
    """
    results = {}
    first = evaluation_bos(tokenizer, bos)[0]
    for name, spec in name_eval_sets(datasets).items():
        windows = eval_windows(load_eval_tokens(spec, tokenizer, first is None), seq_len, name, first)
        results[name] = perplexity(model, windows, batch_size)
    return results


def _summed_loss(model: PreTrainedModel, batch: Tensor) -> float:
    """Cross-entropy of ``batch`` (count, seqlen) of token ids, summed over all targets, in nats."""
    logits, total = model(input_ids=batch, use_cache=False).logits, 0.0
    for window_logits, window in zip(logits, batch, strict=True):
        # One window at a time: the fp32 logits of a whole batch could exceed the size of the model.
        total += functional.cross_entropy(window_logits[:-1].float(), window[1:], reduction="sum").item()
    return total


def evaluate(
    model: PreTrainedModel, eval_sets: EvalSets, context: Callable[[Tensor, int], AbstractContextManager] | None = None
) -> list[dict[str, Any]]:
    """Perplexity of ``model`` on every evaluation set, as entries of ``run.json``; logs each.

    Args:
        model: model to evaluate.
        eval_sets: windows (count, seqlen) by text, window length and BOS.
        context: makes, of windows and batch size, the context manager that each evaluation runs in.
    """
    results = []
    for key, windows in eval_sets.items():
        batch_size = max(1, TOKENS_PER_FORWARD // key.seqlen)
        with context(windows, batch_size) if context else nullcontext():
            value = perplexity(model, windows, batch_size)
        bos = "with BOS" if key.bos else "no BOS"
        logger.info("perplexity %s seqlen %d: %.4f (%d windows, %s)", key.name, key.seqlen, value, len(windows), bos)
        results.append(
            {"dataset": key.name, "seqlen": key.seqlen, "bos": key.bos, "windows": len(windows), "perplexity": value}
        )
    return results


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int = 4) -> float:
    """Perplexity of ``model`` on ``windows`` (count, seq_len) of token ids; infinity if it overflows."""
    model.eval()
    total = 0.0
    for batch in tqdm(windows.split(batch_size), desc="perplexity", unit="batch", disable=None, leave=False):
        # In a function of its own, which frees the logits before those of the next batch are computed.
        total += _summed_loss(model, batch.to(model.device))
    targets = windows.shape[0] * (windows.shape[1] - 1)
    mean = total / targets
    return math.exp(mean) if mean < math.log(1e300) else math.inf
