"""Defaults that depend on the device: precision of the solver, tokens per forward."""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import TYPE_CHECKING

import torch

from slim_utils.common.memory import free_memory
from slim_utils.families import LayerShape, layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOLVE_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Of a device without slow fp64, fp64 runs at half the rate of fp32 or above it; others are at 1/32 and below.
FAST_FP64_RATE = 0.4
PROBE_SIZE, PROBE_REPEATS = 2048, 5
CPU_TOKENS_PER_FORWARD, MAX_TOKENS_PER_FORWARD = 4096, 65536
# Share of the free memory that the intermediates of a forward may take.
FORWARD_SHARE = 0.25


def resolve_solve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; for ``auto`` fp64, or fp32 on a device with slow fp64."""
    if name != "auto":
        return SOLVE_DTYPES[name]
    return torch.float64 if device.type == "cpu" or fp64_rate(device) >= FAST_FP64_RATE else torch.float32


@cache
def fp64_rate(device: torch.device) -> float:
    """Rate of fp64 matrix products on a GPU, relative to fp32, by short products."""
    seconds = {dtype: _product_seconds(device, dtype) for dtype in SOLVE_DTYPES.values()}
    return seconds[torch.float32] / seconds[torch.float64]


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a matrix product, the median of several after a first one."""
    factor, seconds = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device), []
    for _ in range(PROBE_REPEATS + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        factor @ factor
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def model_tokens_per_forward(
    model: PreTrainedModel, device: torch.device, cache_dev: torch.device, num_tokens: int
) -> int:
    """:func:`default_tokens_per_forward` of a run on ``model`` with so many calibration tokens in this process."""
    hidden_size, dtype = model.config.hidden_size, model.dtype
    # Layers hold the activations of all tokens up to three times.
    cached = 3 * num_tokens * hidden_size * dtype.itemsize if cache_dev == device else 0
    return default_tokens_per_forward(device, layer_shapes(model.config), hidden_size, dtype, cached)


def default_tokens_per_forward(
    device: torch.device, shapes: list[LayerShape], hidden_size: int, dtype: torch.dtype, reserved: int
) -> int:
    """Tokens of one forward of a layer: ``CPU_TOKENS_PER_FORWARD``, or what a GPU's free memory allows.

    Args:
        device: where layers run.
        shapes: of all layers.
        hidden_size: of the model.
        dtype: of the activations.
        reserved: bytes that the run will keep on the device besides.

    Returns:
        A power of two from ``CPU_TOKENS_PER_FORWARD`` to ``MAX_TOKENS_PER_FORWARD``.
    """
    tokens = CPU_TOKENS_PER_FORWARD
    if device.type == "cpu":
        return tokens
    # Residual stream and its norms; queries, keys, values and attention output; gate, up, their product.
    widest = max(4 * shape.num_heads * shape.head_dim + 4 * shape.num_columns for shape in shapes)
    bytes_per_token = (4 * hidden_size + widest) * dtype.itemsize
    affordable = FORWARD_SHARE * max(free_memory(device) - reserved, 0) / bytes_per_token
    while tokens * 2 <= min(affordable, MAX_TOKENS_PER_FORWARD):
        tokens *= 2
    return tokens
