"""Latency table: measured seconds of a decoder layer by its heads and FFN columns, for prefill and decode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slim_utils.common.errors import UserError, error_reason
from slim_utils.families import LayerShape

FORMAT_VERSION = 1
# Workloads that a latency target counts: the forward over the prompt, one decoding step, or both with all steps.
WORKLOADS = ("prefill", "decode", "generation")


@dataclass(frozen=True)
class PhaseSeconds:
    """Seconds of the prefill, and of one decoding step of the batch."""

    prefill: float
    decode: float

    def of(self, workload: str, new_tokens: int) -> float:
        """Return the seconds of one of ``WORKLOADS``, a generation with ``new_tokens`` decoding steps."""
        if workload == "generation":
            return self.prefill + new_tokens * self.decode
        return self.prefill if workload == "prefill" else self.decode


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of a part of a layer by the number of units that it keeps.

    Attributes:
        kept: numbers of units, ascending; the last one is that of the widest layer.
        seconds: measured seconds with each of them.
    """

    kept: list[int]
    seconds: list[PhaseSeconds]

    def at(self, kept: int, workload: str, new_tokens: int) -> float:
        """Return the seconds with ``kept`` units, linear between the measured numbers and constant below the first."""
        return float(np.interp(kept, self.kept, [phases.of(workload, new_tokens) for phases in self.seconds]))

    def monotone(self) -> LatencyCurve:
        """Return the nearest curve, in least squares, that does not fall with the number of units."""
        prefill = isotonic([phases.prefill for phases in self.seconds])
        decode = isotonic([phases.decode for phases in self.seconds])
        return replace(self, seconds=[PhaseSeconds(*pair) for pair in zip(prefill, decode, strict=True)])


def isotonic(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence nearest to ``values`` in least squares (pool adjacent violators)."""
    # Sum and number of the values that were pooled.
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            (later, number), (earlier, count) = pools.pop(), pools.pop()
            pools.append((earlier + later, count + number))
    return [total / count for total, count in pools for _ in range(count)]


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of decoder layers of one kind, which differ in heads and columns alone.

    Attributes:
        layers: indices of the layers.
        heads: seconds of the attention by units of heads: query heads of each kv group, or kv groups.
        columns: seconds of everything else in the layer by FFN columns, of each expert in a mixture of experts.
    """

    layers: list[int]
    heads: LatencyCurve
    columns: LatencyCurve


@dataclass(frozen=True)
class TimedRequest:
    """The batch that was timed: ``batch_size`` prompts of ``prompt_tokens``, then ``new_tokens`` decoding steps."""

    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32

    @property
    def text(self) -> str:
        """Short description."""
        return f"{self.batch_size} × {self.prompt_tokens} tokens + {self.new_tokens} steps"


@dataclass(frozen=True)
class TimedModel:
    """The model that a table belongs to; tables of models that differ in any of these do not apply.

    Attributes:
        model_type: model type of the family before pruning.
        hidden_size: size of the activations between layers.
        vocab_size: rows of the embedding.
        shapes: shape of every layer.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    shapes: list[LayerShape]

    @property
    def text(self) -> str:
        """Short description."""
        return f"{self.model_type}, {len(self.shapes)} layers, hidden size {self.hidden_size}"


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of a model by the heads and FFN columns of its layers.

    Attributes:
        model: the model.
        dtype: dtype of its weights.
        device: name of the device.
        gqa_unit: unit of heads in grouped-query attention.
        request: the timed batch.
        rest: seconds outside of the decoder layers.
        kinds: seconds of the layers of every kind.
        versions: versions of the libraries.
        command: command that measured the table.
    """

    model: TimedModel
    dtype: str
    device: str
    gqa_unit: str
    request: TimedRequest
    rest: PhaseSeconds
    kinds: list[LayerLatency]
    versions: dict[str, str]
    command: str

    def layer_curves(self) -> list[LayerLatency]:
        """Return the curves of every layer in order."""
        by_layer = {index: kind for kind in self.kinds for index in kind.layers}
        return [by_layer[index] for index in range(len(self.model.shapes))]

    def head_seconds(self, layer: int, kept: int, workload: str) -> float:
        """Return the seconds of the attention of a layer that keeps ``kept`` units of heads."""
        return self.layer_curves()[layer].heads.at(kept, workload, self.request.new_tokens)

    def column_seconds(self, layer: int, kept: int, workload: str) -> float:
        """Return the seconds of the rest of a layer that keeps ``kept`` FFN columns."""
        return self.layer_curves()[layer].columns.at(kept, workload, self.request.new_tokens)

    def rest_seconds(self, workload: str) -> float:
        """Return the seconds outside of the decoder layers."""
        return self.rest.of(workload, self.request.new_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LatencyTable:
        """Return the table of which ``content`` is :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: if it is not.
        """
        content = dict(content)
        if content.pop("format") != FORMAT_VERSION:
            raise ValueError(f"another format than {FORMAT_VERSION}")
        model = content["model"]
        shapes = [LayerShape(**shape) for shape in model["shapes"]]
        kinds = [
            LayerLatency(kind["layers"], _curve_from_json(kind["heads"]), _curve_from_json(kind["columns"]))
            for kind in content["kinds"]
        ]
        if sorted(index for kind in kinds for index in kind.layers) != list(range(len(shapes))):
            raise ValueError("layers without times")
        converted = {
            "model": TimedModel(**{**model, "shapes": shapes}),
            "request": TimedRequest(**content["request"]),
            "rest": PhaseSeconds(**content["rest"]),
            "kinds": kinds,
        }
        return cls(**{**content, **converted})


def _curve_from_json(content: dict[str, Any]) -> LatencyCurve:
    curve = LatencyCurve(content["kept"], [PhaseSeconds(**phases) for phases in content["seconds"]])
    if len(curve.kept) != len(curve.seconds) or sorted(set(curve.kept)) != curve.kept or not curve.kept:
        raise ValueError("a curve without a time for each number of units")
    # A file may have been edited.
    return curve.monotone()


def read_latency_table(path: Path, flag: str = "--latency_file") -> LatencyTable:
    """Return the table in a file that ``test_flops.py --latency_table`` wrote.

    Raises:
        UserError: if the file cannot be read or is not a table, naming ``flag``.
    """
    try:
        return LatencyTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{flag} {path}: not a latency table of test_flops.py --latency_table ({error_reason(error)})"
        ) from None
