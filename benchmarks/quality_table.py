"""The table of a result of ``bench_quality.py``, as it stands in README.

python -m benchmarks.quality_table benchmarks/results/bench_quality.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from slim_utils.cli import ArgumentParser, run_cli

NAMES = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda_sp": "Wanda-sp",
    "flap": "FLAP",
    "slimgpt_uniform": "SlimGPT, uniform",
    "slimgpt_log_increase": "SlimGPT, log_increase",
    "fine_log_increase": "the same, finer choices",
    "best": "SlimGPT, --preset best",
}


def table(record: dict[str, Any]) -> str:
    """A line for each share and method; several seeds give mean ± standard deviation."""
    texts = list(record["rows"][0]["perplexity"])
    lines = [
        f"| heads | removed | method | {' | '.join(texts)} | seconds | peak (MiB) |",
        "|---" * (5 + len(texts)) + "|",
    ]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["heads"], row["share"], row["method"]), []).append(row)
    order = list(NAMES)
    for heads, share, method in sorted(groups, key=lambda key: (key[0] != "repeated", key[1], order.index(key[2]))):
        rows = groups[heads, share, method]
        removed = statistics.mean(row.get("share_removed", 0.0) for row in rows)
        cells = [spread([row["perplexity"][text] for row in rows], ".2f") for text in texts]
        cells.append(spread([row["seconds"] for row in rows], ".0f") if share else "")
        cells.append(spread([row["peak_memory_mib"]["host"] for row in rows], ".0f"))
        lines.append(f"| {heads} | {100 * removed:.1f} % | {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Mean, and standard deviation where there are several."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(table(json.loads(args.file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    parser = ArgumentParser(prog="quality_table.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    run_cli(lambda: main(parser.parse_args()), "quality_table.py")
