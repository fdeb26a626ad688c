"""Sources of a report: pruning runs and benchmark results, recognised by their content."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_utils.common.errors import UserError, error_reason
from slim_utils.common.output_folder import RUN_FILE
from slim_utils.masks import PRUNING_FILE, LayerMask, read_pruning

Rows = list[dict[str, Any]]

RUN = "pruning run"
QUALITY = "perplexity of pruning methods at equal size"
SERVING = "throughput in serving engines"
PRUNING_COST = "seconds and memory of pruning"
COMPARISON = "comparison of checkpoints"
SPEED = "prefill and decode latency of two models"
PERPLEXITY = "perplexity before and after pruning"
RECOVERY = "prune, LoRA, evaluate"
CALIBRATION = "perplexity by calibration data"
CHOICES = "error by choices within a layer"
SINKS = "attention sinks lost by pruning"
CONSTANTS = "perplexity with one default changed at a time"
RECOVERY_CURVE = "loss after recovery training, by tokens and seconds"
SOLVER = "seconds of the solver alone"
DISTILLATION_STEP = "cost of a training step with a teacher"
EXPERTS = "perplexity without whole experts or columns at equal size"

# Keys of a file of each kind, and keys of its first row.
_SIGNATURES: dict[str, tuple[set[str], set[str]]] = {
    RUN: ({"layers", "pruning_seconds", "sizes"}, set()),
    QUALITY: ({"rows"}, {"heads", "method", "share", "perplexity"}),
    SERVING: ({"rows"}, {"engine", "model", "tokens_per_second"}),
    PRUNING_COST: ({"median_seconds", "runs"}, set()),
    COMPARISON: ({"dense", "pruned"}, set()),
    SPEED: ({"models", "timings"}, set()),
    PERPLEXITY: ({"rows"}, {"heads", "share_asked", "perplexity"}),
    RECOVERY_CURVE: ({"rows"}, {"method", "recovery", "tokens", "perplexity"}),
    SOLVER: ({"rows", "gemm_operations_per_second"}, {"columns", "dtype", "median_seconds"}),
    DISTILLATION_STEP: ({"rows"}, {"way", "tokens_per_second"}),
    # Before RECOVERY, whose rows have some of these keys.
    CONSTANTS: ({"rows"}, {"model", "share", "variant", "perplexity"}),
    RECOVERY: ({"rows", "protocol"}, {"model", "perplexity"}),
    CALIBRATION: ({"rows"}, {"text", "num_samples", "seqlen", "perplexity"}),
    EXPERTS: ({"rows"}, {"unit", "experts_removed", "perplexity"}),
    CHOICES: ({"rows"}, {"layer", "kind", "choice", "held_out"}),
    SINKS: ({"rows"}, {"share", "text_starts", "lost"}),
}

# Models of a comparison.
COMPARED = ("dense", "pruned", "recovered")
# Display names of the methods of benchmarks/bench_quality.py, by their names in its file.
METHOD_NAMES = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda_sp": "Wanda-sp",
    "flap": "FLAP",
    "slimgpt_uniform": "SlimGPT, uniform",
    "slimgpt_log_increase": "SlimGPT, log_increase",
    "fine_log_increase": "the same, finer choices",
    "best": "SlimGPT, --preset best",
    "refined": "SlimGPT, --preset best --refine 1",
}


@dataclass(frozen=True)
class Source:
    """One RUN argument of the command line.

    Attributes:
        path: the json file.
        label: unique name in the report.
        kind: one of the constants of this module.
        record: content of the file.
        masks: masks of a pruning run; ``None`` without a ``pruning.json`` beside ``run.json``.
    """

    path: Path
    label: str
    kind: str
    record: dict[str, Any]
    masks: list[LayerMask] | None

    @property
    def slug(self) -> str:
        """The label, made safe for file names."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.label).strip("._") or "run"


def read_sources(paths: list[Path]) -> list[Source]:
    """Read the sources ``paths``; duplicates are read once.

    Raises:
        UserError: naming the first path that is missing, broken or of an unknown kind.
    """
    files = list(dict.fromkeys(map(_json_file, paths)))
    names = [file.absolute().parent.name if file.name == RUN_FILE else file.stem for file in files]
    counts = Counter(names)
    labels = [name if counts[name] == 1 else str(file) for name, file in zip(names, files, strict=True)]
    return [_read(file, label) for file, label in zip(files, labels, strict=True)]


def _json_file(path: Path) -> Path:
    file = path / RUN_FILE if path.is_dir() else path
    if not file.is_file():
        reason = f"no {RUN_FILE} in this folder" if path.is_dir() else "no such file or folder"
        raise UserError(f"RUN {path}: {reason}; give a --save_dir of model_slimming.py or a json of a benchmark")
    return file


def _read(file: Path, label: str) -> Source:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"RUN {file}: cannot be read as json ({error_reason(error)})") from None
    kind = _kind(record)
    if kind is None:
        raise UserError(f"RUN {file}: unknown kind of file; supported: {'; '.join(_SIGNATURES)}")
    pruning = file.with_name(PRUNING_FILE)
    masks = read_pruning(pruning) if kind == RUN and pruning.is_file() else None
    return Source(file, label, kind, record, masks)


def _kind(record: Any) -> str | None:
    """Kind of a file with the content ``record``; ``None`` if it is unknown."""
    if not isinstance(record, dict) or not record:
        return None
    rows = record.get("rows")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    for kind, (keys, row_keys) in _SIGNATURES.items():
        if keys <= record.keys() and row_keys <= first.keys():
            return kind
    return None


def flatten(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names (``outer.inner`` if nested) and values of plain entries and lists of them; nested lists are skipped."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from flatten(inner, f"{prefix}{name}.")
        elif not isinstance(inner, list) or not any(isinstance(item, (dict, list)) for item in inner):
            yield f"{prefix}{name}", inner


def raw_rows(source: Source) -> Rows:
    """The numbers of a source as flat rows (see :func:`flatten`).

    Raises:
        UserError: naming the source if it is incomplete.
    """
    return require_complete(lambda: [dict(flatten(row)) for row in _rows(source)], [source])


def require_complete(build: Callable[[], list], sources: list[Source]) -> list:
    """Result of ``build``, which reads ``sources``.

    Raises:
        UserError: naming the files if ``build`` misses a key or a value of their kind.
    """
    try:
        return build()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        files, reason = ", ".join(str(source.path) for source in sources), error_reason(error)
        raise UserError(f"RUN {files}: incomplete file of the kind {sources[0].kind} ({reason})") from None


def _rows(source: Source) -> Rows:
    record = source.record
    if source.kind == RUN:
        return [*record["layers"], *(record.get("perplexity") or [])]
    if source.kind == PRUNING_COST:
        return [{"way": way, **run} for way, runs in record["runs"].items() for run in runs]
    if source.kind == COMPARISON:
        return [{"model": name, **record[name]} for name in COMPARED if name in record]
    if source.kind == SPEED:
        return [
            {"batch_size": timing["batch_size"], "length": timing["length"], "model": model, **latency}
            for timing in record["timings"]
            for model, latency in zip(record["models"], timing["latencies"], strict=True)
        ]
    return record["rows"]
