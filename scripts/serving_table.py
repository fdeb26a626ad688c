"""Renders what the serving tests have passed into docs/serving.md.

    SLIMGPT_SERVING_TABLE=serving/tested.json bash scripts/test_serving.sh
    python -m scripts.serving_table serving/tested.json docs/serving.md

The tests write the json file; remove it first to start from nothing.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_text_atomic
from slim_utils.common.errors import UserError
from slim_utils.profiling.tables import markdown_table

BEGIN, END = "<!-- serving table -->\n", "<!-- end of serving table -->"
# Columns of the table, in this order; others follow.
SHAPES = ("dense", "query heads", "kv groups", "stock")


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="serving_table.py", description="Table of what the serving tests have passed.")
    parser.add_argument("results", type=Path, help="json file that the tests have written")
    parser.add_argument("page", type=Path, help="Markdown page with the markers of the table")
    return parser


def table(rows: list[dict[str, str]]) -> str:
    """Markdown table with a line per engine and family, and the data types that passed per shape.

    Args:
        rows: engine, family, shape and dtype of every comparison that passed.
    """
    found = {row["shape"] for row in rows}
    shapes = [shape for shape in SHAPES if shape in found] + sorted(found - set(SHAPES))
    passed: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in rows:
        passed.setdefault((row["engine"], row["family"]), {}).setdefault(row["shape"], set()).add(row["dtype"])
    lines = [
        (*key, *(", ".join(sorted(by_shape.get(shape, ()))) for shape in shapes))
        for key, by_shape in sorted(passed.items())
    ]
    return markdown_table(("engine", "family", *shapes), lines)


def with_table(page: str, rows: list[dict[str, str]]) -> str:
    """Text of a page with the table between its markers.

    Raises:
        UserError: if the page lacks the markers.
    """
    pattern = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", flags=re.DOTALL)
    if not pattern.search(page):
        raise UserError(f"the page has no lines {BEGIN.strip()} and {END}, between which the table goes")
    return pattern.sub(lambda _: f"\n{table(rows)}\n\n", page)


def main(args: argparse.Namespace) -> None:
    """Replace the table of the page."""
    rows = json.loads(args.results.read_text(encoding="utf-8"))["rows"]
    write_text_atomic(args.page, with_table(args.page.read_text(encoding="utf-8"), rows))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "serving_table.py")
