"""Shared by the tests of ``model_finetune.py``."""

import json
import subprocess
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import model_finetune
from tests.processes import run_python
from train_utils.finetune_args import parse_args

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> None:
    """Run the script in this process."""
    model_finetune.main(parse_args(argv))


def run(argv: list[str], *launcher: str, **options) -> subprocess.CompletedProcess:
    """Run the script in new processes."""
    return run_python(*launcher, "model_finetune.py", *argv, **options)


def logits(path: Path, samples: torch.Tensor) -> torch.Tensor:
    """Logits of a checkpoint."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(samples).logits


def losses(output: Path) -> dict[int, float]:
    """Training loss by step."""
    record = json.loads((output / "run.json").read_text())
    return {entry["step"]: entry["loss"] for entry in record["log"] if "loss" in entry}
