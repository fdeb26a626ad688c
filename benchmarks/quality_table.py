"""Print the tables of a result of ``bench_quality.py``, as in docs/results.md.

python -m benchmarks.quality_table benchmarks/results/bench_quality.json
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.profiling.tables import markdown_table
from slim_utils.report.sources import METHOD_NAMES

# Reference of the loss table, and methods without a line in it.
ORIGINAL = "slimgpt_log_increase"
OMITTED = ("dense", "magnitude", ORIGINAL)

Rows = dict[tuple[str, float, str], list[dict[str, Any]]]


def group_rows(record: dict[str, Any]) -> Rows:
    """Rows by heads, share and method, in the order of the tables; the rows of a group differ in their seed."""
    groups: Rows = {}
    for row in record["rows"]:
        groups.setdefault((row["heads"], row["share"], row["method"]), []).append(row)
    order = list(METHOD_NAMES)
    return dict(
        sorted(groups.items(), key=lambda item: (item[0][0] != "repeated", item[0][1], order.index(item[0][2])))
    )


def table(record: dict[str, Any]) -> str:
    """Markdown table with one row per share and method; mean ± standard deviation for several seeds."""
    texts, lines = list(record["rows"][0]["perplexity"]), []
    for (heads, share, method), rows in group_rows(record).items():
        removed = statistics.mean(row.get("share_removed", 0.0) for row in rows)
        cells = [mean_and_std([row["perplexity"][text] for row in rows], ".2f") for text in texts]
        cells.append(mean_and_std([row["seconds"] for row in rows], ".0f") if share else "")
        cells.append(mean_and_std([row["peak_memory_mib"]["host"] for row in rows], ".0f"))
        lines.append((heads, f"{100 * removed:.1f} %", METHOD_NAMES[method], *cells))
    return markdown_table(("heads", "removed", "method", *texts, "seconds", "peak (MiB)"), lines)


def loss_table(record: dict[str, Any]) -> str:
    """Increase of ln perplexity over dense by method, relative to that of ``ORIGINAL`` with the same seed."""
    texts, groups, lines = list(record["rows"][0]["perplexity"]), group_rows(record), []
    for (heads, share, method), rows in groups.items():
        originals = {row["seed"]: row for row in groups.get((heads, share, ORIGINAL), [])}
        pairs = [(row, originals[row["seed"]]) for row in rows if row["seed"] in originals]
        if method not in OMITTED and pairs:
            dense = groups[heads, 0.0, "dense"][0]
            cells = [
                mean_and_std([loss(row, dense, text) / loss(original, dense, text) for row, original in pairs], ".2f")
                for text in texts
            ]
            lines.append((heads, f"{100 * share:.0f} %", METHOD_NAMES[method], *cells))
    return markdown_table(("heads", "removed", "method", *texts), lines)


def loss(row: dict[str, Any], dense: dict[str, Any], text: str) -> float:
    """``ln PPL − ln PPL_dense`` on ``text``."""
    return math.log(row["perplexity"][text] / dense["perplexity"][text])


def mean_and_std(values: list[float], form: str) -> str:
    """Mean of ``values`` and, for several, their standard deviation, in the format ``form``."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def main(args: argparse.Namespace) -> None:
    """Print the tables."""
    record = json.loads(args.file.read_text(encoding="utf-8"))
    print(table(record), loss_table(record), sep="\n\n")


if __name__ == "__main__":
    parser = ArgumentParser(prog="quality_table.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    run_cli(lambda: main(parser.parse_args()), "quality_table.py")
