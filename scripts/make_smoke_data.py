"""Make small instruction and task files from a text, for smoke tests of the recipes without a hub.

    python -m scripts.make_smoke_data wiki.calibration.txt FOLDER

Writes FOLDER/alpaca.jsonl (continue a sentence), FOLDER/tasks/piqa/validation.jsonl (the end of a sentence against that
of another, in PIQA's columns) and FOLDER/evaluation.txt. They only show that a recipe runs.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import atomic_folder
from slim_utils.common.errors import UserError

ROWS = 96
EVALUATION_CHARS = 20_000


def half_sentences(text: str) -> list[tuple[str, str]]:
    """First and second halves of ``ROWS`` sentences of 12 to 40 words.

    Raises:
        UserError: if the text has too few such sentences.
    """
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text)]
    halves = [
        (" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]))
        for words in sentences
        if 12 <= len(words) <= 40
    ]
    if len(halves) < ROWS:
        raise UserError(f"TEXT: {len(halves)} sentences of 12 to 40 words, but {ROWS} are needed; use a longer text")
    return halves[:ROWS]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    """Write the files if the folder does not exist."""
    if args.folder.is_dir():
        return
    text = args.text.read_text(encoding="utf-8")
    halves = half_sentences(text)
    alpaca = [{"instruction": "Continue the sentence.", "input": first, "output": rest} for first, rest in halves]
    piqa = []
    for index, (first, rest) in enumerate(halves):
        wrong = halves[(index + 1) % len(halves)][1]
        endings = (rest, wrong) if index % 2 else (wrong, rest)
        piqa.append({"goal": first, "sol1": endings[0], "sol2": endings[1], "label": 1 - index % 2})
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(args.folder) as folder:
        write_rows(folder / "alpaca.jsonl", alpaca)
        (folder / "tasks" / "piqa").mkdir(parents=True)
        write_rows(folder / "tasks" / "piqa" / "validation.jsonl", piqa)
        (folder / "evaluation.txt").write_text(text[-EVALUATION_CHARS:], encoding="utf-8")


if __name__ == "__main__":
    parser = ArgumentParser(prog="make_smoke_data.py", description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="text file")
    parser.add_argument("folder", type=Path, help="folder to write")
    run_cli(lambda: main(parser.parse_args()), "make_smoke_data.py")
