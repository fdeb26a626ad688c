"""Table of what the comparisons with serving engines have passed, for docs/serving.md.

Tests add their row when they have passed, if ``SLIMGPT_SERVING_TABLE`` names a json file.
"""

import json
import os
from pathlib import Path

from slim_utils.common.atomic_output import write_json_atomic


def record_served(engine: str, family: str, shape: str, dtype: str) -> None:
    """Add a row to the table: ``engine`` generates what Transformers does.

    Args:
        engine: name and way of serving, such as ``vLLM 0.32.0, plugin``.
        family: model type before pruning.
        shape: shapes of the model, such as ``kv groups``.
        dtype: data type of the weights.
    """
    target = os.environ.get("SLIMGPT_SERVING_TABLE")
    if not target:
        return
    path = Path(target).resolve()
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    row = {"engine": engine, "family": family, "shape": shape, "dtype": dtype}
    kept = [known for known in rows if known != row]
    command = "SLIMGPT_SERVING_TABLE=benchmarks/results/serving_table.json bash scripts/test_serving.sh"
    rows = sorted([*kept, row], key=lambda entry: tuple(entry.values()))
    write_json_atomic(path, {"command": command, "rows": rows})
