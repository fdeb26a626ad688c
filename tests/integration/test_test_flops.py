"""``test_flops.py`` run as a user runs it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import test_flops
from slim_utils.common.errors import UserError
from slim_utils.profiling.latency import measure_latency
from tests.processes import run_python
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    """Run the script in a new process."""
    return run_python("test_flops.py", *arguments)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory) -> Path:
    """A model with half the FFN columns of ``checkpoint``."""
    path = tmp_path_factory.mktemp("models") / "smaller"
    make_tiny("gqa", intermediate_size=20).save_pretrained(path)
    return path


def test_test_flops_of_a_single_model_needs_no_weights(checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    process = run("--base_model", tmp_path)
    assert process.returncode == 0, process.stderr
    layers, totals = process.stdout.split("\n\n")
    assert layers.splitlines()[0].split()[:3] == ["layer", "heads", "kv"]
    # 6 heads and 2 kv heads of 4, 40 columns, hidden size 24, two norms; a float32 key and value per kv head.
    assert layers.splitlines()[4].split() == ["3", "6", "2", "40", "0.004", "0.48", "64"]
    assert totals.splitlines()[3].split() == ["KV", "cache", "(KiB/token)", "0.25"]


def test_test_flops_with_compare_writes_sizes_and_latencies(checkpoint, smaller, tmp_path):
    out = tmp_path / "speed.json"
    arguments = ["--base_model", checkpoint, "--compare", smaller, "--dtype", "bfloat16", "--device", "cpu"]
    arguments += ["--batch_sizes", 1, 2, "--lengths", 8, 16, "--new_tokens", 3, "--repeats", 2, "--out", out]
    process = run(*arguments)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].split() == ["base", "other", "ratio"]
    assert len(lines) == 1 + 4 + 4 * 4
    record = json.loads(out.read_text())
    base, other = record["models"][str(checkpoint)], record["models"][str(smaller)]
    assert base["parameters"] - other["parameters"] == 4 * 3 * 24 * 20
    assert base["weight_bytes"] == 2 * base["parameters"]
    assert [(timing["batch_size"], timing["length"]) for timing in record["timings"]] == [
        (1, 8), (1, 16), (2, 8), (2, 16)
    ]  # fmt: skip
    for latency in (latency for timing in record["timings"] for latency in timing["latencies"]):
        assert len(latency["decode_runs"]) == 2
        assert 0 < latency["decode_seconds"] == pytest.approx(sum(latency["decode_runs"]) / 2)
    with pytest.raises(UserError, match="--overwrite"):
        test_flops.main(test_flops.build_parser().parse_args(list(map(str, arguments))))


def test_test_flops_with_skip_latency_needs_no_weights(checkpoint, smaller, tmp_path):
    (tmp_path / "config.json").write_bytes((smaller / "config.json").read_bytes())
    process = run("--base_model", checkpoint, "--compare", tmp_path, "--skip_latency")
    assert process.returncode == 0, process.stderr
    assert "prefill" not in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base_model", "{tmp}/none"], "no such folder"),
        (["--base_model", "{model}", "--seqlen", "0"], "--seqlen"),
        (["--base_model", "{model}", "--batch_sizes", "0"], "--batch_sizes"),
        (["--base_model", "{model}", "--out", "{tmp}/no/x.json"], "--out"),
        (["--base_model", "{model}", "--compare", "{model}", "--lengths", "60"], "64 positions"),
        (["--base_model", "{model}", "--compare", "{tmp}/none"], "no such folder"),
    ],
)
def test_test_flops_with_wrong_input_names_the_flag(arguments, message, checkpoint, tmp_path):
    arguments = [argument.format(model=checkpoint, tmp=tmp_path) for argument in arguments]
    with pytest.raises(UserError, match=message):
        test_flops.main(test_flops.build_parser().parse_args(arguments))


def test_test_flops_with_wrong_input_exits_with_one_line(tmp_path):
    process = run("--base_model", tmp_path / "none")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1


def test_measure_latency_steps_equal_greedy_generation(samples, monkeypatch):
    """The timed loop gives the tokens of ``generate``."""
    model = make_tiny("gqa")
    monkeypatch.setattr(torch, "randint", lambda *_, **__: samples[:2])
    steps = []
    monkeypatch.setattr(model, "forward", recording(model.forward, steps))
    measure_latency([model], batch_size=2, prompt_tokens=16, new_tokens=4, repeats=1)
    fed = torch.cat(steps[:5], dim=1)
    assert fed.equal(model.generate(samples[:2], max_new_tokens=4, min_new_tokens=4, do_sample=False))


def recording(forward, steps: list):
    """``forward`` that appends its ``input_ids`` to ``steps``."""

    def recorded(*args, **kwargs):
        steps.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    return recorded


def test_build_parser_has_the_flag_of_the_original():
    assert test_flops.build_parser().parse_args(["--base_model", "m"]).seqlen == 64
