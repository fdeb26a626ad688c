"""Incremental pruning ratio: a pruning ratio per layer (paper, section on the incremental pruning ratio)."""

import math

from slim_utils.common.errors import UserError

STRATEGIES = ("log_increase", "log_decrease", "linear_increase", "linear_decrease")


def layer_range(minlayer: int, maxlayer: int, num_layers: int) -> range:
    """Return the layers to prune: ``[minlayer, maxlayer)`` clipped to the depth of the model.

    Raises:
        UserError: if the range is empty.
    """
    layers = range(max(minlayer, 0), min(maxlayer, num_layers))
    if not layers:
        raise UserError(
            f"no layer to prune between --minlayer {minlayer} and --maxlayer {maxlayer}: the model has layers 0 to "
            f"{num_layers - 1}"
        )
    return layers


def non_uniform_ratios(strategy: str, min_sparsity: float, max_sparsity: float, count: int) -> list[float]:
    """Return the pruning ratio of each of ``count`` pruned layers.

    ``log_increase`` is ``r_i = min + (max − min) · ln(1 + i) / ln(count)``, ``linear_increase`` is
    ``r_i = min + (max − min) · i / (count − 1)``; ``*_decrease`` are the same ratios in reverse order. The
    original hard-codes a depth of 32; with ``count`` 32 the ratios are equal. A single layer gets ``max_sparsity``.

    Raises:
        UserError: for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"--non_uniform_strategy {strategy}: choose from {', '.join(STRATEGIES)}")
    if count == 1:
        return [max_sparsity]
    if strategy.startswith("log"):
        fractions = [math.log(1 + i) / math.log(count) for i in range(count)]
    else:
        fractions = [i / (count - 1) for i in range(count)]
    ratios = [min_sparsity + (max_sparsity - min_sparsity) * fraction for fraction in fractions]
    return ratios[::-1] if strategy.endswith("decrease") else ratios


def layer_ratios(layers: range, num_layers: int, pruned_ratios: list[float]) -> list[float]:
    """Return the ratio of every layer of the model: ``pruned_ratios`` on ``layers``, 0 elsewhere."""
    ratios = [0.0] * num_layers
    for layer, ratio in zip(layers, pruned_ratios, strict=True):
        ratios[layer] = ratio
    return ratios


def units_to_remove(num_units: int, ratio: float) -> int:
    """Return ``round(num_units · ratio)``, as in the original, but at most ``num_units − 1``."""
    return min(round(num_units * ratio), num_units - 1)
