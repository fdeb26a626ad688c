"""Calibration with a BOS on Gemma-3-270M, whose tokenizer adds one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import models  # noqa: F401 - registers the classes of pruned checkpoints

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cache() -> Path:
    """Folder with the cached model and texts."""
    folder = Path(os.environ.get("SLIMGPT_CACHE") or Path.home() / ".cache" / "slimgpt")
    for script in ("fetch_smollm2.py", "fetch_gemma3.py"):
        subprocess.run([sys.executable, f"scripts/{script}", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_model_slimming_with_bos_halves_the_loss_of_gemma(cache, tmp_path):
    (tmp_path / "text.txt").write_text((cache / "wiki.evaluation.txt").read_text()[:20_000])
    figures = {}
    for bos in ("always", "never"):
        out = tmp_path / bos
        command = [sys.executable, "model_slimming.py", cache / "gemma-3-270m", "--num_samples", 16, "--seqlen", 256]
        command += ["--data_file", cache / "wiki.calibration.txt", "--target_ratio", 0.2, "--bos", bos]
        command += ["--allocation", "log_increase", "--min_sparsity", 0.0625, "--skip_evaluate"]
        command += ["--save_pruned_weights", "--save_dir", out]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
        # Both are measured with a BOS, as the model is used.
        figures[bos] = perplexity(out / "pruned_weights", tmp_path)
        assert json.loads((out / "run.json").read_text())["calibration"]["bos"] is (bos == "always")
    dense = perplexity(cache / "gemma-3-270m", tmp_path)
    assert dense < figures["always"] < figures["never"]
    assert figures["always"] / dense < (figures["never"] / dense) ** 0.67
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "always" / "pruned_weights")
    assert loaded.config.model_type == "slim_gemma3"


def perplexity(model: Path, folder: Path) -> float:
    """Perplexity of ``model`` on the text in ``folder``."""
    from ppl_eval.ppl_eval import ppl_metric
    from slim_utils.common.loading import load_model, load_tokenizer

    loaded = load_model(str(model), "auto", False)
    return ppl_metric(loaded, load_tokenizer(str(model), False), [str(folder / "text.txt")], 512)["text.txt"]
