"""Incremental pruning ratio: how much of each layer goes (paper, section on the incremental pruning ratio)."""

import math
from typing import NamedTuple

from slim_utils.common.errors import UserError

STRATEGIES = ("log_increase", "log_decrease", "linear_increase", "linear_decrease")


class LayerRatio(NamedTuple):
    """Pruning ratios of the heads (or kv groups) and of the FFN columns of a layer."""

    heads: float
    columns: float

    @classmethod
    def of(cls, ratio: "float | LayerRatio") -> "LayerRatio":
        """One ratio stands for both."""
        return ratio if isinstance(ratio, LayerRatio) else cls(ratio, ratio)


def layer_range(minlayer: int, maxlayer: int, num_layers: int) -> range:
    """Layers to prune: ``[minlayer, maxlayer)`` cut to the depth of the model.

    Raises:
        UserError: if no layer is left.
    """
    layers = range(max(minlayer, 0), min(maxlayer, num_layers))
    if not layers:
        raise UserError(
            f"no layer to prune between --minlayer {minlayer} and --maxlayer {maxlayer}: the model has layers 0 to "
            f"{num_layers - 1}"
        )
    return layers


def non_uniform_ratios(strategy: str, min_sparsity: float, max_sparsity: float, count: int) -> list[float]:
    """Pruning ratio of each of ``count`` pruned layers.

    ``log_increase`` is ``r_i = min + (max − min) · ln(1 + i) / ln(count)``, ``linear_increase`` is
    ``r_i = min + (max − min) · i / (count − 1)``; ``*_decrease`` are the same ratios in reverse order. With ``count``
    32 they are those of the original, which had that depth built in. A single layer gets ``max_sparsity``.

    Raises:
        UserError: for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"--non_uniform_strategy {strategy}: choose from {', '.join(STRATEGIES)}")
    if count == 1:
        return [max_sparsity]
    if strategy.startswith("log"):
        shares = [math.log(1 + i) / math.log(count) for i in range(count)]
    else:
        shares = [i / (count - 1) for i in range(count)]
    ratios = [min_sparsity + (max_sparsity - min_sparsity) * share for share in shares]
    return ratios[::-1] if strategy.endswith("decrease") else ratios


def layer_ratios(layers: range, num_layers: int, pruned_ratios: list[float]) -> list[float]:
    """Ratio of every layer of the model: ``pruned_ratios`` on ``layers``, 0 elsewhere."""
    ratios = [0.0] * num_layers
    for layer, ratio in zip(layers, pruned_ratios, strict=True):
        ratios[layer] = ratio
    return ratios


def aligned_ratios(ratios: list[float], totals: list[int], multiples: list[int], alike: bool = False) -> list[float]:
    """Ratios that keep a multiple of units in every pruned layer.

    All layers together keep as many units as without it, but for less than a multiple that goes beyond what was asked.
    Whole multiples that are left over go to the layers that rounding down cost most.

    Args:
        ratios: of every layer; one of 0 is left alone.
        totals: units of every layer; one with fewer than its multiple is left as asked.
        multiples: of every layer, at least 1.
        alike: no layer gets a multiple that was left over.
    """
    kept = [total - round(total * ratio) for ratio, total in zip(ratios, totals, strict=True)]
    layers = [i for i, ratio in enumerate(ratios) if ratio > 0 and totals[i] >= multiples[i]]
    aligned = {i: max(kept[i] // multiples[i], 1) * multiples[i] for i in layers}
    spare = 0 if alike else sum(kept[i] - aligned[i] for i in layers)
    for i in sorted(layers, key=lambda i: aligned[i] - kept[i]):
        if spare >= multiples[i] and aligned[i] + multiples[i] <= totals[i]:
            aligned[i] += multiples[i]
            spare -= multiples[i]
    return [1 - aligned[i] / totals[i] if i in aligned else ratio for i, ratio in enumerate(ratios)]
