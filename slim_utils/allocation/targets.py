"""Overall targets: what is counted (block weights, parameters, multiply-accumulates, bytes), and how much is removed.

Every count here is linear in the removed units of a layer, so that one allocation meets a target whatever it counts;
``latency_target.py`` has the target in milliseconds, which is not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from slim_utils.allocation.budget import LayerUnits, block_weights, cost_removed
from slim_utils.common.errors import UserError
from slim_utils.common.loading import DTYPES
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerPlan
from slim_utils.profiling.model_stats import count_parameters, model_stats
from slim_utils.pruning_config import MACS_TOKENS, PruningConfig
from slim_utils.routers import active_by_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_BYTES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_COUNTS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"S": 1, "MS": 1e-3, "US": 1e-6}
# Units of a size, and an example, by flag.
_UNITS = {
    "--target_memory": (_BYTES, "6GiB"),
    "--target_macs": (_COUNTS, "3.2G"),
    "--target_latency": (_SECONDS, "12ms"),
}
# Makes the plans of a budget, given units with their costs.
Allocate: TypeAlias = Callable[[list[LayerUnits], float], list[LayerPlan]]


@dataclass(frozen=True)
class Size:
    """A size to reach: an absolute one, or a share of the dense model's.

    Attributes:
        value: the size, or the share.
        is_share: whether ``value`` is a share.
    """

    value: float
    is_share: bool

    def of(self, dense: float) -> float:
        """Return the size to reach for a dense model of the size ``dense``."""
        return self.value * dense if self.is_share else self.value


def parse_size(flag: str, text: str) -> Size:
    """Return the size in ``text``: a number in a unit of ``flag`` (``6GiB``, ``3.2G``, ``12ms``), or a share: ``0.8x``.

    Raises:
        UserError: if ``text`` is neither.
    """
    units, example = _UNITS[flag]
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", text.strip(), flags=re.IGNORECASE)
    try:
        value, unit = float(match[1]), match[2].upper()  # type: ignore[index]
        size = Size(value, True) if unit == "X" else Size(value * units[unit], False)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{flag} {text}: give a size such as {example}, or a share of the dense model's: 0.8x"
        ) from None
    if size.value <= 0 or (size.is_share and size.value >= 1):
        raise UserError(f"{flag} {text}: above 0{' and below 1' if size.is_share else ''}")
    return size


@dataclass(frozen=True)
class Target:
    """What a run removes in total.

    Attributes:
        budget: how much is removed, in what the costs of ``units`` count.
        units: units of every layer with their costs.
        dense: size of the model before pruning, for a target in multiply-accumulates, bytes or time.
        describe: returns a size in what the target counts as text, with its unit.
    """

    budget: float
    units: list[LayerUnits]
    dense: float | None = None
    describe: Callable[[float], str] = str

    def counts(self, plans: Sequence[LayerPlan]) -> list[tuple[int, int]]:
        """Return the units of heads and the columns that ``plans`` remove from every layer."""
        return [layer.counts(plan) for layer, plan in zip(self.units, plans, strict=True)]

    def removed(self, counts: Sequence[Sequence[int]]) -> float:
        """Return what ``counts`` of heads and columns of every layer count in the budget."""
        return cost_removed(counts, self.units)

    def plans_by(self, allocate: Allocate, around: Sequence[LayerPlan] = ()) -> list[LayerPlan]:
        """Return the plans by ``allocate`` that meet the budget.

        Args:
            allocate: makes plans from units with their costs and a budget.
            around: plans near which the budget is met; costs that are linear do not depend on them.

        Raises:
            UnreachableTargetError: if ``allocate`` cannot meet the budget.
        """
        return allocate(self.units, self.budget)


def target_of(
    config: PruningConfig, model: PreTrainedModel, units: list[LayerUnits], settings: PruningSettings
) -> Target:
    """Return the target of a run; without one, nothing is removed.

    Args:
        config: flags of the run.
        model: the model before pruning; its weights may be on the meta device.
        units: units of every layer; their costs are block weights.
        settings: how layers are pruned.

    Raises:
        UserError: if the target is not smaller than the model.
    """
    family, shapes = find_family(model.config), layer_shapes(model.config)
    if config.target_params is not None:
        parameters = count_parameters(model)
        if not 0 < config.target_params < parameters:
            raise UserError(f"--target_params {config.target_params:g}: the model has {parameters} parameters")
        return Target(parameters - config.target_params, units)
    if config.target_size is None:
        weights = block_weights(family.decoder_layers(model), family, shapes)
        return Target((config.target_ratio or 0) * weights, units)
    size = parse_size(*config.target_size)
    if config.target_memory is not None and not size.is_share and saved_dtype(config, model.config) is None:
        raise UserError(f"--target_memory {config.target_memory}: the checkpoint names no dtype; add --dtype")
    dense = measured_size(config, model.config)
    requested = size.of(dense)
    if requested >= dense:
        raise UserError(f"{' '.join(config.target_size)}: the model has {size_text(config, dense)}")
    if config.target_macs is not None:
        active = active_by_layer(model.config)
        if family.expert_layout.gate_on_inputs:
            # The library runs every expert on every token.
            active = [shape.num_experts for shape in shapes]
        costs = [macs_of(*layer) for layer in zip(units, shapes, active, strict=True)]
    else:
        itemsize = (saved_dtype(config, model.config) or torch.float32).itemsize
        caches = cached_tokens(config, model.config)
        costs = [bytes_of(*entry, settings, itemsize) for entry in zip(units, shapes, caches, strict=True)]
    return Target(dense - requested, costs, dense, partial(size_text, config))


def macs_of(units: LayerUnits, shape: LayerShape, active: int) -> LayerUnits:
    """Return ``units`` with their multiply-accumulates for ``MACS_TOKENS`` tokens as costs.

    Attention counts all pairs of tokens, for scores and for values, as :func:`model_stats` does.

    Args:
        units: units of the layer; their costs are block weights.
        shape: shape of the layer.
        active: experts that run on a token.
    """
    attention = units.heads_per_unit * shape.attention_macs * MACS_TOKENS**2 if units.head_cost else 0
    columns = units.column_cost * MACS_TOKENS
    if shape.num_experts:
        shared = units.shared_weights * MACS_TOKENS
        columns = (columns - shared) * active // shape.num_experts + shared
    return replace(units, head_cost=units.head_cost * MACS_TOKENS + attention, column_cost=columns)


def bytes_of(units: LayerUnits, shape: LayerShape, cached: int, settings: PruningSettings, itemsize: int) -> LayerUnits:
    """Return ``units`` with the bytes of their weights and of their keys and values as costs.

    Args:
        units: units of the layer; their costs are block weights.
        shape: shape of the layer.
        cached: tokens of the layer's KV cache, over the batch.
        settings: how layers are pruned.
        itemsize: bytes of a weight.
    """
    # Query heads alone leave keys and values as they are, as all heads do with latents.
    query_heads = settings.by_query_head(shape) and (shape.heads_per_group > 1 or bool(shape.kv_sharing))
    cache = 0
    if not (query_heads or shape.latent_dim) and units.head_cost:
        kv_heads = units.heads_per_unit // shape.heads_per_group
        cache = shape.cached_values // shape.num_kv_heads * kv_heads * cached
    return replace(units, head_cost=(units.head_cost + cache) * itemsize, column_cost=units.column_cost * itemsize)


def cached_tokens(config: PruningConfig, model_config: PreTrainedConfig) -> list[int]:
    """Return the tokens of every layer's KV cache for ``--at_context`` and ``--at_batch``.

    A layer with a sliding window caches no more tokens of a sequence than the window.
    """
    batch, context = config.cache_size
    text = model_config.get_text_config()
    window = min(getattr(text, "sliding_window", None) or context, context)
    # Without a list of kinds, a window is that of all layers.
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [batch * (window if kind == "sliding_attention" else context) for kind in kinds]


def saved_dtype(config: PruningConfig, model_config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype of the saved weights; ``None`` if neither the run nor the checkpoint names one."""
    return model_config.dtype if config.dtype == "auto" else DTYPES[config.dtype]


def measured_size(config: PruningConfig, model_config: PreTrainedConfig) -> float:
    """Return the size of the model of ``model_config`` in what the target of the run counts."""
    stats = model_stats(model_config, MACS_TOKENS, saved_dtype(config, model_config))
    if config.target_macs is not None:
        return stats.macs
    tokens = cached_tokens(config, model_config)
    return stats.weight_bytes + sum(
        layer.kv_cache_bytes * count for layer, count in zip(stats.layers, tokens, strict=True)
    )


def target_record(
    config: PruningConfig, dense_config: PreTrainedConfig, pruned_config: PreTrainedConfig
) -> dict[str, Any]:
    """Return the size of the dense model, the requested and the achieved one, and log them.

    Args:
        config: flags of the run, with a target in multiply-accumulates or bytes.
        dense_config: configuration of the model before pruning.
        pruned_config: that of the saved pruned model, which is counted.
    """
    assert config.target_size is not None
    flag, text = config.target_size
    dense, achieved = (measured_size(config, model_config) for model_config in (dense_config, pruned_config))
    requested = parse_size(flag, text).of(dense)
    logger.info("pruned model: %s", share_text(size_text(config, achieved), achieved, requested, dense))
    return {"flag": flag, "dense": dense, "requested": requested, "achieved": achieved}


def share_text(size_text: str, size: float, requested: float, dense: float) -> str:
    """Return ``size_text`` with the share of the dense model's size, and the requested share."""
    return f"{size_text}, {size / dense:.4f} of the model's (requested: {requested / dense:.4f})"


def size_text(config: PruningConfig, size: float) -> str:
    """Return a size in what the target of the run counts, with its unit."""
    if config.target_macs is not None:
        return f"{size / 1e9:.4g} G multiply-accumulates for {MACS_TOKENS} tokens"
    batch, context = config.cache_size
    return f"{size / 2**30:.4g} GiB of weights and KV cache for {batch} × {context} tokens"
