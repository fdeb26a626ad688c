"""Table of what the comparisons with serving engines have passed, for docs/serving.md.

Tests add their row when they have passed, if ``SLIMGPT_SERVING_TABLE`` names a json file.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.environment import environment

COMMAND = "SLIMGPT_SERVING_TABLE=serving/tested.json bash scripts/test_serving.sh"
# Pinned versions of the engines.
ENGINES = ("requirements-llamacpp.txt", "requirements-quantisation.txt", "requirements-vllm.txt")
ROOT = Path(__file__).resolve().parents[2]


def record_served(engine: str, family: str, shape: str, dtype: str) -> None:
    """Add a row to the table: ``engine`` generates what Transformers does.

    Args:
        engine: name and way of serving, such as ``vLLM, plugin``.
        family: model type before pruning.
        shape: shapes of the model, such as ``kv groups``.
        dtype: data type of the weights.
    """
    target = os.environ.get("SLIMGPT_SERVING_TABLE")
    if not target:
        return
    path = Path(target).resolve()
    row = {"engine": engine, "family": family, "shape": shape, "dtype": dtype}
    pins = {name: (ROOT / name).read_text(encoding="utf-8").split() for name in ENGINES}
    table = {"command": COMMAND, "environment": environment(torch.device("cpu")), "engines": pins}
    with _locked(path.parent):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        rows = sorted([*(known for known in rows if known != row), row], key=lambda entry: tuple(entry.values()))
        write_json_atomic(path, table | {"rows": rows})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes, which may add rows too, waiting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
