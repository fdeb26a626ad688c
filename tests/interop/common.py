"""Shared by the comparisons with serving engines: models to serve, and greedy tokens of Transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import models  # noqa: F401 - registers the classes of pruned checkpoints

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SLIMGPT_CACHE") or Path.home() / ".cache" / "slimgpt")
SMOLLM2, GEMMA3 = CACHE / "SmolLM2-135M-Instruct", CACHE / "gemma-3-270m"
CALIBRATION_TEXT = CACHE / "wiki.calibration.txt"
EVALUATION_TEXT = CACHE / "wiki.evaluation.txt"
PROMPTS = ["The history of the city began in", "Once upon a time there was", "Water boils at", "He wrote a book about"]
NEW_TOKENS = 24

# SmolLM2 in all served shapes; "stock" is a checkpoint without custom code.
SHAPES: dict[str, list[str]] = {
    "dense": [],
    "kv groups": ["--non_uniform", "--min_sparsity", "0.0625", "--max_sparsity", "0.23", "--gqa_unit", "kv_group"],
    "query heads": ["--non_uniform", "--min_sparsity", "0.1", "--max_sparsity", "0.4"],
    "stock": ["--sparsity", "0.2", "--uniform_shapes", "--multiple_of", "64"],
}


def run(*argv: object, path: Path | None = None) -> None:
    """Run a script of the suite, with the packages in the folder ``path`` too."""
    variables = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, *map(str, argv)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=variables)
    assert process.returncode == 0, process.stderr


def run_engine(python: Path, script: str, *argv: object, stdin: str = "", plugin: Path | None = None) -> Any:
    """Finished process of a script of this folder in the environment of an engine.

    Args:
        python: interpreter of the environment.
        script: name of the script.
        argv: its arguments.
        stdin: its input.
        plugin: folder of an installed plugin, added to the environment.
    """
    command = [str(python), str(ROOT / "tests" / "interop" / script), *map(str, argv)]
    variables = {"PYTHONPATH": str(plugin)} if plugin else {}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, env=os.environ | variables)


def engine(*args: Any, **options: Any) -> dict[str, Any]:
    """JSON that a script prints in the environment of an engine; arguments of :func:`run_engine`."""
    process = run_engine(*args, **options)
    assert process.returncode == 0, process.stderr
    # Workers may print when they end.
    return json.loads(next(line for line in reversed(process.stdout.splitlines()) if line.startswith("{")))


def smollm2(shape: str, out: Path, *flags: str) -> Path:
    """Folder of SmolLM2 in one of ``SHAPES``, pruned into ``out``."""
    if not SHAPES[shape]:
        return SMOLLM2
    argv = [SMOLLM2, "--data_file", CALIBRATION_TEXT, "--num_samples", 8, "--seqlen", 256, *SHAPES[shape], *flags]
    run("model_slimming.py", *argv, "--skip_evaluate", "--save_pruned_weights", "--save_dir", out)
    return out / "pruned_weights"


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompt: list[int], near_tie: float) -> list[int]:
    """Greedy continuation of ``prompt`` up to the first near tie: two best logits closer than ``near_tie``."""
    inputs = torch.tensor([prompt])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    best = model(output).logits[0, len(prompt) - 1 : -1].topk(2).values
    ties = (best[:, 0] - best[:, 1] < near_tie).nonzero().flatten().tolist()
    new = output[0, len(prompt) :].tolist()
    return new[: ties[0]] if ties else new
