"""Latency tables of tiny models, made up: exact answers are known."""

from collections.abc import Callable

from transformers import PreTrainedConfig

from slim_utils.allocation.latency_measurement import timed_model
from slim_utils.profiling.latency_table import (
    LatencyCurve,
    LatencyTable,
    LayerLatency,
    PhaseSeconds,
    TimedRequest,
)


def curve(kept: list[int], prefill: Callable[[int], float]) -> LatencyCurve:
    """Curve with these prefill times in milliseconds; decoding steps take a quarter of a millisecond more."""
    return LatencyCurve(kept, [PhaseSeconds(prefill(n) / 1e3, prefill(n) / 1e3 + 0.25e-3) for n in kept])


def made_up_table(
    config: PreTrainedConfig,
    heads: Callable[[int], float],
    columns: Callable[[int], float],
    units: int = 3,
    width: int = 40,
    gqa_unit: str = "query_head",
    rest: float = 1.0,
) -> LatencyTable:
    """Table of a model whose layers are alike, with every number of heads and columns, in milliseconds."""
    model = timed_model(config)
    kind = LayerLatency(
        list(range(len(model.shapes))),
        curve(list(range(1, units + 1)), heads),
        curve(list(range(1, width + 1)), columns),
    )
    return LatencyTable(
        model=model,
        dtype="float32",
        device="an abacus",
        gqa_unit=gqa_unit,
        request=TimedRequest(2, 8, 3),
        rest=PhaseSeconds(rest / 1e3, rest / 1e3),
        kinds=[kind],
        versions={},
        command="by hand",
    )
