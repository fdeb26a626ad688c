"""The flow of ``gpu_checks.py``: order, resuming, failing and slow parts; and its parts with tiny sizes."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, gpu_parts
from benchmarks.gpu_checks import FAILED, LEFT_OUT, NO_TIME, PASSED, STANDS, Part, make_parts, run_parts
from slim_utils.common.errors import UserError
from tests.conftest import random_text
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[3]
# Appends its name to a file, and does what its second argument says.
SCRIPT = """
import json, os, subprocess, sys, time
name, action, result, order = sys.argv[1:]
open(order, "a").write(name + "\\n")
print("begins", name)
if action == "fail":
    sys.exit("no luck")
if action == "sleep":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(order + ".pid", "w").write(str(child.pid))
    time.sleep(60)
if action != "silent":
    json.dump({"value": 3}, open(result, "w"))
"""


@pytest.fixture
def part(tmp_path):
    """Makes a part of the script above."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(name: str, action: str = "write", seconds: float = 30, **options) -> Part:
        argv = [str(script), name, action, "{result}", str(tmp_path / "order")]
        return Part(name, argv, seconds, lambda result: f"value {result['value']}", **options)

    return make


def order(tmp_path: Path) -> list[str]:
    return (tmp_path / "order").read_text().split()


def test_parts_run_in_order_and_failing_ones_do_not_stop_the_others(part, tmp_path):
    parts = [part("a"), part("b", "fail"), part("c", "silent"), part("left", reason="needs --model"), part("d")]
    outcomes = run_parts(parts, tmp_path / "out", 60, True)
    assert order(tmp_path) == ["a", "b", "c", "d"]
    assert [outcome.status for outcome in outcomes] == [PASSED, FAILED, FAILED, LEFT_OUT, PASSED]
    assert outcomes[0].text == "value 3" and outcomes[1].text == "exit code 1: no luck"
    assert outcomes[2].text.startswith("no result: ") and outcomes[3].text == "needs --model"
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.json")) == ["a.json", "d.json"]
    assert json.loads((out / "a.json").read_text())["result"] == {"value": 3}
    assert (out / "b.log").read_text().split() == ["begins", "b", "no", "luck"]


def test_parts_run_again_are_those_without_a_result(part, tmp_path):
    run_parts([part("a"), part("b", "fail"), part("c")], tmp_path / "out", 60, True)
    outcomes = run_parts([part("a", "fail"), part("b"), part("c", "fail")], tmp_path / "out", 60, True)
    assert order(tmp_path) == ["a", "b", "c", "b"]
    assert [outcome.status for outcome in outcomes] == [STANDS, PASSED, STANDS]
    assert outcomes[0].text == "value 3"


def test_part_out_of_time_is_ended_with_its_processes(part, tmp_path):
    start = time.perf_counter()
    outcomes = run_parts([part("slow", "sleep", seconds=1.5), part("next")], tmp_path / "out", 60, True)
    assert time.perf_counter() - start < 20
    assert [outcome.status for outcome in outcomes] == [FAILED, PASSED]
    assert outcomes[0].text.startswith("not finished in 2 s")
    child = int((tmp_path / "order.pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_parts_without_time_are_not_started(part, tmp_path):
    outcomes = run_parts([part("a"), part("b")], tmp_path / "out", 0, True)
    assert [outcome.status for outcome in outcomes] == [NO_TIME, NO_TIME]
    assert not (tmp_path / "order").exists()


def parse(*words: object):
    return gpu_checks.build_parser().parse_args(list(map(str, words)))


def test_make_parts_fit_the_time_and_leave_out_what_has_no_inputs(tmp_path):
    parts = make_parts(parse(tmp_path, "--device", "cuda"))
    assert [part.name for part in parts] == [
        "gpu_tests", "prune_float64", "prune_float32", "rescue", "stream", "recovery", "serving"
    ]  # fmt: skip
    assert [part.name for part in parts if part.reason] == ["recovery"]
    assert parts[5].reason == "needs --model, --calib_file, --train_text, --eval_files"
    assert sum(part.seconds for part in parts) <= 25 * 60


@pytest.mark.parametrize(("action", "code"), [("write", 0), ("fail", 1)])
def test_main_prints_a_table_and_exits_with_1_if_a_part_failed(part, tmp_path, monkeypatch, capsys, action, code):
    monkeypatch.setattr(gpu_checks, "make_parts", lambda args: [part("a", action), part("b")])
    args = parse(tmp_path / "out", "--rehearse", "--device", "cpu")
    if code:
        with pytest.raises(SystemExit) as exit_info:
            gpu_checks.main(args)
        assert exit_info.value.code == 1
    else:
        gpu_checks.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["part", "status", "seconds"]
    assert lines[1].split()[:2] == ["a", FAILED if code else PASSED] and lines[2].split()[:2] == ["b", PASSED]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary["parts"]] == [line.split()[1] for line in lines[1:]]


def test_main_with_results_of_a_rehearsal_is_refused_on_a_gpu(part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "make_parts", lambda args: [part("a")])
    gpu_checks.main(parse(tmp_path / "out", "--rehearse", "--device", "cpu"))
    monkeypatch.setattr(gpu_checks, "choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match=r"out: has results of a rehearsal \(a.json\); choose another folder"):
        gpu_checks.main(parse(tmp_path / "out"))
    assert order(tmp_path) == ["a"]


def test_main_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="no CUDA device; --rehearse"):
        gpu_checks.main(parse(tmp_path / "out", "--device", "cpu"))
    assert not (tmp_path / "out").exists()


def test_main_with_a_missing_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="--eval_files a=none: give NAME=FILE"):
        gpu_checks.main(parse(tmp_path / "out", "--rehearse", "--device", "cpu", "--eval_files", "a=none"))


@pytest.mark.parametrize("skipped", [0, 3])
def test_read_tests_of_a_run_on_a_gpu_that_skips_all_is_a_failure(tmp_path, monkeypatch, skipped):
    monkeypatch.setattr(gpu_checks.torch.cuda, "is_available", lambda: True)
    suite = f'<testsuites><testsuite tests="3" failures="0" errors="0" skipped="{skipped}"/></testsuites>'
    (tmp_path / "result").write_text(suite)
    if skipped == 3:
        with pytest.raises(UserError, match="all tests were skipped"):
            gpu_checks.read_tests(tmp_path / "result")
    else:
        assert gpu_checks.tests_figure(gpu_checks.read_tests(tmp_path / "result")) == "3 tests passed, 0 skipped"


TINY = ["--model", "smollm2-135m", "--layers", 2, "--num_samples", 4, "--seqlen", 16, "--dtype", "float32"]


def test_part_rescue_goes_on_with_less_and_has_the_same_figures(tmp_path):
    out = tmp_path / "out.json"
    words = list(map(str, ["rescue", *TINY, "--device", "cpu", "--out", out]))
    gpu_parts.main(gpu_parts.build_parser().parse_args(words))
    (row,) = json.loads(out.read_text())["limited"]
    assert "retrying with 2 samples per forward" in row["retries"][0] and row["batch_samples"] == 2
    assert row["equal"] and row["equal_units"] == 1


def test_compared_runs_with_other_units_or_errors_are_not_equal():
    args = gpu_parts.build_parser().parse_args(list(map(str, ["rescue", *TINY, "--out", "none"])))
    args.device = torch.device("cpu")
    whole = gpu_parts.prune_within(args, gpu_parts.shape_config(args), None)
    assert gpu_parts.compared(whole, whole)["equal"] and not whole.retries
    units = whole.masks[0].kept_columns
    other = sorted(set(range(1536)) - set(units))[: len(units) // 10]
    moved = replace(whole.masks[0], kept_columns=sorted([*units[len(other) :], *other]))
    assert not gpu_parts.compared(whole, replace(whole, masks=[moved, *whole.masks[1:]]))["equal"]
    error = replace(whole.reports[1].mlp, error_compensated=0.1 * whole.reports[1].mlp.error_uncompensated)
    reports = [whole.reports[0], replace(whole.reports[1], mlp=error)]
    assert not gpu_parts.compared(whole, replace(whole, reports=reports))["equal"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gpu_checks_rehearsed_on_the_cpu_pass_all_parts(tokenizer, tmp_path):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("needs scripts/test.sh's .venv")
    model = tmp_path / "model"
    # The protocol of the recovery has windows of 1024 tokens.
    make_tiny("gqa", max_position_embeddings=2048).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for seed, name in enumerate(("calib", "train", "eval")):
        (tmp_path / f"{name}.txt").write_text(random_text(20_000, seed))
    inputs = {"MODEL": model, "CALIB": tmp_path / "calib.txt", "TEXT": tmp_path / "train.txt"}
    inputs |= {"EVAL": f"mine={tmp_path / 'eval.txt'}"}
    environment = {**os.environ, **{name: str(value) for name, value in inputs.items()}}
    command = ["bash", str(ROOT / "scripts" / "gpu_checks.sh"), str(tmp_path / "out"), "--rehearse"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert [line.split()[1] for line in process.stdout.splitlines()[1:]] == [PASSED] * 7
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert again.stdout.count(STANDS) == 7


@pytest.mark.parametrize("words", [[], ["--rehearse"], ["out", "--fast"], ["out", "--rehearse", "more"]])
def test_shell_with_wrong_arguments_is_one_line(words):
    script = str(ROOT / "scripts" / "gpu_checks.sh")
    process = subprocess.run(["bash", script, *words], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("gpu_checks.sh: error: give the folder of the results")
