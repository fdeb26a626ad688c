"""What a report is made of: runs and results of benchmarks, told apart by what is in them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_utils.common.errors import UserError
from slim_utils.common.loading import RUN_FILE
from slim_utils.masks import PRUNING_FILE, LayerMask, read_pruning

Rows = list[dict[str, Any]]

RUN = "pruning run"
QUALITY = "perplexity at the same size, method by method"
SERVING = "tokens a second in serving engines"
PRUNING_COST = "seconds and memory of pruning"
COMPARISON = "two checkpoints side by side"
SPEED = "prefill and decode of two models"
PERPLEXITY = "perplexity before and after pruning"
RECOVERY = "prune, LoRA, evaluate"
CALIBRATION = "perplexity by calibration data"
CHOICES = "error by choices inside a layer"
STARTS = "attention sinks that pruning loses"
CONSTANTS = "perplexity by defaults changed one at a time"

# Of each kind, keys that its file has, and keys that the first of its rows has.
_SIGNS: dict[str, tuple[set[str], set[str]]] = {
    RUN: ({"layers", "pruning_seconds", "sizes"}, set()),
    QUALITY: ({"rows"}, {"heads", "method", "share", "perplexity"}),
    SERVING: ({"rows"}, {"engine", "model", "tokens_per_second"}),
    PRUNING_COST: ({"median_seconds", "runs"}, set()),
    COMPARISON: ({"dense", "pruned"}, set()),
    SPEED: ({"models", "timings"}, set()),
    PERPLEXITY: ({"rows"}, {"heads", "share_asked", "perplexity"}),
    # Before the next kind, whose rows have some of these keys.
    CONSTANTS: ({"rows"}, {"model", "share", "variant", "perplexity"}),
    RECOVERY: ({"rows", "protocol"}, {"model", "perplexity"}),
    CALIBRATION: ({"rows"}, {"text", "num_samples", "seqlen", "perplexity"}),
    CHOICES: ({"rows"}, {"layer", "kind", "choice", "held_out"}),
    STARTS: ({"rows"}, {"share", "text_starts", "lost"}),
}

# Of the methods of benchmarks/bench_quality.py, by their names in its file.
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
    """One RUN of the command line.

    Attributes:
        path: the json file.
        label: what the report calls it; no other source has the same.
        kind: one of the constants of this module.
        record: content of the file.
        masks: of a pruning run, what every layer kept; None where no ``pruning.json`` is beside ``run.json``.
    """

    path: Path
    label: str
    kind: str
    record: dict[str, Any]
    masks: list[LayerMask] | None

    @property
    def slug(self) -> str:
        """The label as part of a file's name."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.label).strip("._") or "run"


def read_sources(paths: list[Path]) -> list[Source]:
    """Read every one of ``paths``, a path given twice once.

    Raises:
        UserError: naming the first that is missing, broken or of an unknown kind.
    """
    files = list(dict.fromkeys(map(_json_file, paths)))
    names = [file.absolute().parent.name if file.name == RUN_FILE else file.stem for file in files]
    often = Counter(names)
    labels = [name if often[name] == 1 else str(file) for name, file in zip(names, files, strict=True)]
    return [_read(file, label) for file, label in zip(files, labels, strict=True)]


def _json_file(path: Path) -> Path:
    file = path / RUN_FILE if path.is_dir() else path
    if not file.is_file():
        lacking = f"no {RUN_FILE} in this folder" if path.is_dir() else "no such file or folder"
        raise UserError(f"RUN {path}: {lacking}; give a --save_dir of model_slimming.py, or a json of a benchmark")
    return file


def _read(file: Path, label: str) -> Source:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"RUN {file}: cannot be read as json ({type(error).__name__}: {error})") from None
    kind = _kind(record)
    if kind is None:
        raise UserError(f"RUN {file}: of an unknown kind; known are: {'; '.join(_SIGNS)}")
    pruning = file.with_name(PRUNING_FILE)
    masks = read_pruning(pruning) if kind == RUN and pruning.is_file() else None
    return Source(file, label, kind, record, masks)


def _kind(record: Any) -> str | None:
    """The kind of a file of this content; None if it is of none."""
    if not isinstance(record, dict) or not record:
        return None
    rows = record.get("rows")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    for kind, (keys, row_keys) in _SIGNS.items():
        if keys <= record.keys() and row_keys <= first.keys():
            return kind
    return None


def flat(value: dict[str, Any], start: str = "") -> Iterable[tuple[str, Any]]:
    """Plain values, and lists of them, under their names, ``outer.inner`` where nested; other lists are left out."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from flat(inner, f"{start}{name}.")
        elif not isinstance(inner, list) or not any(isinstance(one, (dict, list)) for one in inner):
            yield f"{start}{name}", inner


def raw_rows(source: Source) -> Rows:
    """The numbers of a source as rows of what :func:`flat` gives.

    Raises:
        UserError: naming the source that lacks something a file of its kind has.
    """
    return checked(lambda: [dict(flat(row)) for row in _rows(source)], [source])


def checked(make: Callable[[], list], sources: list[Source]) -> list:
    """What ``make`` makes of ``sources``.

    Raises:
        UserError: naming the files if they lack something a file of their kind has.
    """
    try:
        return make()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        files, reason = ", ".join(str(source.path) for source in sources), f"{type(error).__name__}: {error}"
        raise UserError(f"RUN {files}: not a whole file of its kind, {sources[0].kind} ({reason})") from None


def _rows(source: Source) -> Rows:
    record = source.record
    if source.kind == RUN:
        return [*record["layers"], *(record.get("perplexity") or [])]
    if source.kind == PRUNING_COST:
        return [{"way": way, **run} for way, runs in record["runs"].items() for run in runs]
    if source.kind == COMPARISON:
        return [{"model": name, **record[name]} for name in ("dense", "pruned")]
    if source.kind == SPEED:
        return [
            {"batch_size": timing["batch_size"], "length": timing["length"], "model": model, **latency}
            for timing in record["timings"]
            for model, latency in zip(record["models"], timing["latencies"], strict=True)
        ]
    return record["rows"]
