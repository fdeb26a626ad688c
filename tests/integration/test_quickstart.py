"""The quick start as a user runs it, on SmolLM2-135M."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_prunes_20_percent_and_reuses_its_cache(tmp_path):
    environment = {**os.environ, "SLIMGPT_CACHE": str(tmp_path / "cache")}
    command = ["bash", "scripts/quickstart.sh", "--save_dir", str(tmp_path / "out"), "--recover", "8192"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    dense, pruned = result["dense"], result["pruned"]
    assert dense["parameters"] == 134_515_008
    assert "removed 19.98 % of the block weights" in process.stderr
    assert pruned["macs"] < 0.85 * dense["macs"]
    for name, value in dense["perplexities"].items():
        assert value < pruned["perplexities"][name] < 2 * value
    assert re.search(r"^pruned: +\w+", process.stdout, flags=re.MULTILINE)
    recovered = result["recovered"]
    assert re.search(r"^ +dense +pruned +ratio +recovered +ratio$", process.stdout, flags=re.MULTILINE)
    assert recovered["parameters"] == pruned["parameters"]
    for name, value in recovered["perplexities"].items():
        assert dense["perplexities"][name] < value < 0.98 * pruned["perplexities"][name]
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again = subprocess.run(
        [".venv/bin/python", "-m", "scripts.fetch_smollm2", str(tmp_path / "cache")], cwd=ROOT, check=False
    )
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == cached


def test_quickstart_with_an_unknown_flag_is_one_line():
    command = ["bash", "scripts/quickstart.sh", "--sparsity", "0.2"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "quickstart.sh: error: unknown flag --sparsity (see the head of the script)\n"


@pytest.mark.parametrize("tokens", ["many", "100", "-5", "1e", "", "1.2.3", "6_", "1e+2", "1E-3", "inf", "0x400"])
def test_quickstart_with_a_wrong_number_of_tokens_is_refused_before_pruning(tokens):
    command = ["bash", "scripts/quickstart.sh", "--recover", tokens]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == f"quickstart.sh: error: --recover {tokens}: give a number of tokens, at least 512\n"


@pytest.mark.parametrize("tokens", ["512", "1e6", "1E6", "1e+6", "+1e06", "1_000_000", ".5e4", "6000.", "5_0e1_0"])
def test_quickstart_takes_the_numbers_of_tokens_that_model_finetune_takes(tokens):
    assert float(tokens) >= 512
    command = ["bash", "scripts/quickstart.sh", "--recover", tokens, "--none", "x"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.stderr == "quickstart.sh: error: unknown flag --none (see the head of the script)\n"


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="needs scripts/test.sh's .venv")
def test_quickstart_with_a_wrong_text_for_perplexity_is_refused_before_pruning(checkpoint, text_file, tmp_path):
    flags = ["--model", checkpoint, "--dataset", text_file, "--save_dir", tmp_path / "out", "--recover", 600]
    command = ["bash", "scripts/quickstart.sh", *map(str, flags), "--eval", "none.txt"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "error: --extra_val_set none.txt: neither" in process.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
