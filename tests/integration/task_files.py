"""Local files of the README's tasks, in the columns of the hub's data sets."""

import json
from pathlib import Path

from ppl_eval.zero_shot import README_TASKS
from tests.conftest import random_text

ROWS = 12


def choices(index: int) -> dict:
    """Four answers of different lengths, in the schema of ARC and OpenBookQA."""
    texts = [random_text(1 + (index + i) % 3, 10 * index + i) for i in range(4)]
    return {"text": texts, "label": ["A", "B", "C", "D"]}


def row(task: str, i: int) -> dict:
    """Row ``i`` of ``task`` in the column schema of the hub's data set."""
    if task == "openbookqa":
        return {"id": str(i), "question_stem": random_text(5, i), "choices": choices(i), "answerKey": "ABCD"[i % 4]}
    if task.startswith("arc"):
        return {"id": str(i), "question": random_text(4, i), "choices": choices(i), "answerKey": "ABCD"[i % 4]}
    if task == "winogrande":
        sentence = f"{random_text(3, i)} _ {random_text(2, i + 50)}"
        return {"sentence": sentence, "option1": f"w{3 + i}", "option2": f"w{20 + i}", "answer": str(1 + i % 2)}
    if task == "piqa":
        return {"goal": random_text(3, i), "sol1": random_text(2, i + 30), "sol2": random_text(3, i), "label": i % 2}
    if task == "boolq":
        return {"question": random_text(3, i), "passage": random_text(8, i + 9), "idx": i, "label": i % 2}
    endings = [random_text(1 + j % 2, 7 * i + j) for j in range(4)]
    context = {"ctx_a": random_text(3, i), "ctx_b": random_text(1, i + 5), "activity_label": "w9"}
    return {**context, "endings": endings, "label": str(i % 4), "ind": i, "source_id": str(i), "split_type": "x"}


def write_tasks(folder: Path) -> None:
    """Write ``ROWS`` rows of every task to ``folder``."""
    for task in README_TASKS:
        has_test = task in ("openbookqa", "arc_easy", "arc_challenge")
        (folder / task).mkdir()
        lines = "".join(json.dumps(row(task, i)) + "\n" for i in range(ROWS))
        (folder / task / f"{'test' if has_test else 'validation'}.jsonl").write_text(lines)
