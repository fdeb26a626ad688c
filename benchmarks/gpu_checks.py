"""Everything that needs a GPU, in order of value, within a time limit.

    bash scripts/gpu_checks.sh OUT
    python -m benchmarks.gpu_checks OUT --model SmolLM2-135M-Instruct --calib_file wiki.valid.txt \
        --train_text wiki.train.txt --eval_files wiki=wiki.test.txt
    python -m benchmarks.gpu_checks OUT --rehearse --device cpu

Parts: the tests marked ``gpu``, without those on several; ``bench_prune.py`` at the shapes of LLaMA-7B on 128 × 2048
tokens, beside the original's procedure, with the solver in float64 and in float32; a shortage of memory; ``--stream``
of layers of a 70B model; recovery of a given model on text up to 1 M tokens; serving by Transformers.

A part that succeeds writes OUT/NAME.json at once; a part with such a file is skipped, so that an interrupted run can be
repeated. Every part has its own time limit and its log OUT/NAME.log; one that fails does not stop the others. A table
at the end says what passed; the exit code is 1 if a part failed or had no time. ``--rehearse`` runs the same parts with
tiny sizes, also without a GPU.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import named_files
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import choose_device
from slim_utils.profiling.tables import text_table

logger = logging.getLogger("gpu_checks")

ROOT = Path(__file__).resolve().parents[1]
WORK_FOLDER = "work"
# A part is not started with less time than this left, in seconds.
MIN_SECONDS = 20
PASSED, FAILED, NO_TIME, LEFT_OUT, STANDS = "passed", "FAILED", "NO TIME", "left out", "passed before"


@dataclass(frozen=True)
class Part:
    """One part of the checks.

    Attributes:
        name: name of its result and log.
        argv: arguments of Python; ``{result}`` is the file that the command writes, ``{work}`` a folder for it.
        seconds: time limit.
        figure: what the table says about its result.
        read: reads the file that the command wrote.
        reason: why the part is left out; empty to run it.
    """

    name: str
    argv: list[str]
    seconds: float
    figure: Callable[[dict[str, Any]], str]
    read: Callable[[Path], dict[str, Any]] = lambda path: json.loads(path.read_text(encoding="utf-8"))
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """Row of the final table: part, status, seconds, and a figure or the reason."""

    part: str
    status: str
    seconds: float
    text: str


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="gpu_checks.py", description="Checks and measurements that need a GPU.")
    parser.add_argument("out", type=Path, help="folder of results and logs")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--minutes", type=float, default=25, help="time limit of all parts (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    recovery = parser.add_argument_group("recovery; left out without them")
    recovery.add_argument("--model", help="dense model as a checkpoint folder")
    recovery.add_argument("--calib_file", type=Path)
    recovery.add_argument("--train_text", nargs="+")
    recovery.add_argument("--eval_files", nargs="+", metavar="NAME=FILE")
    return parser


def read_tests(path: Path) -> dict[str, Any]:
    """Numbers of tests in a JUnit file.

    Raises:
        UserError: if no test was run.
    """
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    counts = dict.fromkeys(names, 0)
    for suite in suites:
        for name in names:
            counts[name] += int(suite.get(name, 0))
    if not counts["tests"]:
        raise UserError("no test was collected")
    if counts["skipped"] == counts["tests"] and torch.cuda.is_available():
        raise UserError("all tests were skipped")
    return counts


def tests_figure(result: dict[str, Any]) -> str:
    """Numbers of tests that passed and were skipped."""
    passed = result["tests"] - result["skipped"] - result["failures"] - result["errors"]
    return f"{passed} tests passed, {result['skipped']} skipped"


def prune_figure(result: dict[str, Any]) -> str:
    """Seconds of this suite and of the original."""
    seconds = result["median_seconds"]
    return f"{seconds['ours']:.1f} s, original {seconds['original']:.1f} s, speed-up {result['speed_up']:.2f}"


def rescue_figure(result: dict[str, Any]) -> str:
    """What the rescued run did, and how far its figures are from the other's."""
    row = result["limited"][-1]
    difference = row["largest_difference_of_errors"]
    return f"{len(row['retries'])} retries, {row['equal_units']:.2%} of the units, errors to within {difference:.1e}"


def stream_figure(result: dict[str, Any]) -> str:
    """Seconds per layer, and the share of the transfers behind the computation."""
    layers = result["seconds_of_layers"]
    overlapped = result["share_of_reading_overlapped"]
    return f"{sum(layers) / len(layers):.1f} s per layer, {overlapped:.0%} of the reading overlapped"


def recovery_figure(result: dict[str, Any]) -> str:
    """First perplexity of the pruned model and after the most tokens."""
    rows = sorted((row for row in result["rows"] if row["share"]), key=lambda row: row["tokens"])
    text = next(iter(rows[0]["perplexity"]))
    before, after = (row["perplexity"][text] for row in (rows[0], rows[-1]))
    return f"{text} {before:.2f} → {after:.2f} on {rows[-1]['tokens']:,} tokens"


def serving_figure(result: dict[str, Any]) -> str:
    """Ratio of the tokens per second by batch."""
    rows = {(row["batch"], row["model"]): row["tokens_per_second"] for row in result["rows"]}
    ratios = [
        f"batch {batch}: {rows[batch, 'pruned'] / rows[batch, 'dense']:.2f} ×"
        for batch, name in rows
        if name == "dense"
    ]
    return ", ".join(ratios)


def module(name: str, *arguments: object) -> list[str]:
    """Arguments of Python that run a benchmark into ``{result}``."""
    return ["-m", f"benchmarks.{name}", *map(str, arguments), "--out", "{result}"]


def make_parts(args: argparse.Namespace) -> list[Part]:
    """All parts in order of value."""
    tiny, device = args.rehearse, ["--device", args.device]
    tests = ["tests/integration/test_gpu.py"] if tiny else []
    pytest = ["-m", "pytest", *tests, "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider", "--junitxml={result}"]
    shape = ["smollm2-135m", "--num_samples", 4, "--seqlen", 64, "--layers", 2, "--dtype", "float32", "--repeats", 1]
    if not tiny:
        shape = ["llama-7b", "--num_samples", 128, "--seqlen", 2048, "--layers", 4, "--dtype", "bfloat16"]
        shape += ["--repeats", 2]
    prune = [*shape, *device, "--ways", "original", "ours", "--overwrite", "--solve_dtype"]
    small = ["--model", "smollm2-135m", "--layers", 2, "--num_samples", 4, "--seqlen", 64, "--dtype", "float32"]
    rescue, stream, serving = (small if tiny else [] for _ in range(3))
    # Other batches round bf16 activations in another way; fp32 shows whether the figures are the same.
    rescue = rescue or ["--num_samples", 64, "--dtype", "float32"]
    serving = [*serving, "--new_tokens", 4, "--repeats", 1, "--batch_sizes", 1] if tiny else ["--new_tokens", 128]
    return [
        Part("gpu_tests", pytest, 390, tests_figure, read_tests),
        Part("prune_float64", module("bench_prune", *prune, "float64"), 300, prune_figure),
        Part("prune_float32", module("bench_prune", *prune, "float32"), 240, prune_figure),
        Part("rescue", module("gpu_parts", "rescue", *rescue, *device), 150, rescue_figure),
        Part(
            "stream", module("gpu_parts", "stream", *stream, *device, "--work_dir", "{work}/stream"), 240, stream_figure
        ),
        recovery_part(args),
        Part("serving", module("gpu_parts", "serving", *serving, *device), 180, serving_figure),
    ]


def recovery_part(args: argparse.Namespace) -> Part:
    """The part of the recovery; left out without a model and texts."""
    inputs = {name: getattr(args, name) for name in ("model", "calib_file", "train_text", "eval_files")}
    missing = [f"--{name}" for name, value in inputs.items() if not value]
    if missing:
        return Part("recovery", [], 0, recovery_figure, reason=f"needs {', '.join(missing)}")
    tokens = [1000] if args.rehearse else [100_000, 1_000_000]
    argv = [args.model, "--calib_file", args.calib_file, "--train_text", *args.train_text]
    argv += ["--eval_files", *args.eval_files, "--methods", "best", "--shares", 0.2]
    argv += ["--recoveries", "none", "KL, block weights", "--tokens", *tokens, "--work_dir", "{work}/recovery"]
    argv += [] if args.rehearse else ["--bf16"]
    return Part("recovery", module("bench_recovery", *argv), 300, recovery_figure)


def run_part(part: Part, out: Path, seconds: float, rehearsal: bool) -> Outcome:
    """Run a part for at most ``seconds``, and write its result if it succeeds."""
    work, log = out / WORK_FOLDER, out / f"{part.name}.log"
    written = work / f"{part.name}.result"
    names = {"{result}": str(written), "{work}": str(work)}
    argv = [sys.executable]
    for word in part.argv:
        for placeholder, path in names.items():
            word = word.replace(placeholder, path)
        argv.append(word)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        # A group of its own: a part that is out of time is ended together with the processes that it started.
        process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome(part.name, FAILED, seconds, f"not finished in {seconds:.0f} s, see {log.name}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    taken = time.perf_counter() - start
    if code != 0:
        return Outcome(part.name, FAILED, taken, f"exit code {code}: {last_line(log)}")
    try:
        result = part.read(written)
        text = part.figure(result)
    except (UserError, OSError, KeyError, ValueError, ElementTree.ParseError) as error:
        return Outcome(part.name, FAILED, taken, f"no result: {error}")
    record = {"part": part.name, "rehearsal": rehearsal, "seconds": round(taken, 1), "figure": text, "result": result}
    write_json_atomic(out / f"{part.name}.json", record)
    return Outcome(part.name, PASSED, taken, text)


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def check_results(parts: list[Part], out: Path, rehearsal: bool) -> None:
    """Check that the results in a folder are all of a rehearsal, or all not.

    Raises:
        UserError: if not.
    """
    for path in (out / f"{part.name}.json" for part in parts):
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["rehearsal"] != rehearsal:
            kind = "the measurements" if rehearsal else "a rehearsal"
            raise UserError(f"{out}: has results of {kind} ({path.name}); choose another folder")


def run_parts(parts: list[Part], out: Path, seconds: float, rehearsal: bool) -> list[Outcome]:
    """Run the parts in order, those without a result; all together take at most ``seconds``."""
    (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    end, outcomes = time.perf_counter() + seconds, []
    for part in parts:
        result, left = out / f"{part.name}.json", end - time.perf_counter()
        if result.exists():
            record = json.loads(result.read_text(encoding="utf-8"))
            outcome = Outcome(part.name, STANDS, record["seconds"], record["figure"])
        elif part.reason:
            outcome = Outcome(part.name, LEFT_OUT, 0, part.reason)
        elif left < min(MIN_SECONDS, part.seconds):
            outcome = Outcome(part.name, NO_TIME, 0, "run again: what passed is kept")
        else:
            logger.info("%s: at most %.0f s", part.name, min(part.seconds, left))
            outcome = run_part(part, out, min(part.seconds, left), rehearsal)
        logger.info("%s: %s (%s)", part.name, outcome.status, outcome.text)
        outcomes.append(outcome)
    return outcomes


def main(args: argparse.Namespace) -> None:
    """Run the parts, print the table and write ``summary.json``; exits with 1 if a part failed or had no time."""
    device = choose_device(args.device)
    if device.type != "cuda" and not args.rehearse:
        raise UserError("no CUDA device; --rehearse runs the same parts with tiny sizes on the CPU")
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes}: above 0")
    named_files("--eval_files", args.eval_files or [])
    parts, out = make_parts(args), args.out.resolve()
    check_results(parts, out, args.rehearse)
    outcomes = run_parts(parts, out, 60 * args.minutes, args.rehearse)
    rows = [(outcome.part, outcome.status, f"{outcome.seconds:.0f}", outcome.text) for outcome in outcomes]
    print(text_table(("part", "status", "seconds", ""), rows))
    summary = {"command": command_line(), **environment(device), "rehearsal": args.rehearse}
    summary["parts"] = [dict(zip(("part", "status", "seconds", "text"), row, strict=True)) for row in rows]
    write_json_atomic(out / "summary.json", summary)
    if any(outcome.status in (FAILED, NO_TIME) for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "gpu_checks.py")
