"""Compare two or three checkpoints, each measured in its own process.

    python scripts/compare_models.py DENSE PRUNED --eval_datasets FILE --eval_seqlens 128 512
    python scripts/compare_models.py DENSE PRUNED RECOVERED

Prints parameters, multiply-accumulates of a (1, 64) forward, perplexities, seconds and peak memory of the evaluation,
and a generated sentence of each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppl_eval.ppl_dataset import DEFAULT_EVAL_SEQLENS, EvalKey, load_eval_sets, name_eval_sets
from ppl_eval.ppl_eval import evaluate
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.adapters import merged_models
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.bos import BOS_HELP, BOS_POLICIES
from slim_utils.common.environment import environment
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_token_ids, num_positions
from slim_utils.common.input_paths import check_inputs_outside, eval_files
from slim_utils.common.loading import DTYPES, choose_device, load_config, load_model, load_tokenizer, peak_memory_mib
from slim_utils.families import find_family
from slim_utils.profiling.model_stats import model_stats
from slim_utils.profiling.tables import Row, side_by_side
from slim_utils.pruning_config import MACS_TOKENS
from slim_utils.report.sources import COMPARED

NEW_TOKENS = 40


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="compare_models.py", description="Compare two or three checkpoints.")
    parser.add_argument("dense", help="first checkpoint, folder or hub name")
    parser.add_argument("pruned", help="second checkpoint, folder or hub name")
    parser.add_argument("recovered", nargs="?", help="third checkpoint, folder or hub name")
    parser.add_argument("--eval_datasets", nargs="+", default=["wikitext2"], help="wikitext2, ptb, FILE or NAME=FILE")
    parser.add_argument("--eval_seqlens", nargs="+", type=int, help="window lengths (default: 128 2048)")
    parser.add_argument("--bos", choices=BOS_POLICIES, default="auto", help=BOS_HELP)
    parser.add_argument("--prompt", default="The history of the city began in", help="start of the generated sentence")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as stored)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code found in the checkpoints")
    parser.add_argument("--out", type=Path, help="json file for the figures")
    parser.add_argument("--measure_to", type=Path, help=argparse.SUPPRESS)
    return parser


def process_args(args: argparse.Namespace) -> argparse.Namespace:
    """Check ``args`` against all configurations, before any weights are loaded.

    Raises:
        UserError: naming the flag to change.
    """
    if any(seqlen < 2 for seqlen in args.eval_seqlens or ()):
        raise UserError("--eval_seqlens: at least 2")
    name_eval_sets(args.eval_datasets)
    if args.out:
        check_output_file(args.out, True, "--out")
        inputs = {name.upper(): merged_models(path) for name, path in model_paths(args).items()}
        inputs |= {"--eval_datasets": eval_files(args.eval_datasets)}
        check_inputs_outside(args.out, "--out", inputs)
    choose_device(args.device)
    positions = {}
    for path in model_paths(args).values():
        config = load_config(path, args.trust_remote_code)
        find_family(config)
        positions[path] = num_positions(config)
    path = min(positions, key=positions.__getitem__)
    args.eval_seqlens = args.eval_seqlens or [seqlen for seqlen in DEFAULT_EVAL_SEQLENS if seqlen <= positions[path]]
    if not args.eval_seqlens or max(args.eval_seqlens) > positions[path]:
        max_seqlen = max(args.eval_seqlens, default=min(DEFAULT_EVAL_SEQLENS))
        raise UserError(f"--eval_seqlens {max_seqlen}: {path} has {positions[path]} positions")
    return args


def model_paths(args: argparse.Namespace) -> dict[str, str]:
    """The given checkpoints by their names in the table."""
    return {name: getattr(args, name) for name in COMPARED if getattr(args, name) is not None}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Sizes, perplexities, seconds, peak memory and a generated sentence of the model ``args.pruned``."""
    device = choose_device(args.device)
    config = load_config(args.pruned, args.trust_remote_code)
    tokenizer = load_tokenizer(args.pruned, args.trust_remote_code)
    sets = load_eval_sets(args.eval_datasets, tokenizer, args.eval_seqlens, num_positions(config), args.bos)
    check_token_ids(config, tokenizer, *sets.values(), torch.tensor(tokenizer(args.prompt).input_ids))
    model = load_model(args.pruned, args.dtype, args.trust_remote_code).to(device)
    start = time.perf_counter()
    perplexities = {
        f"perplexity {EvalKey(row['dataset'], row['seqlen'], row['bos']).label}": row["perplexity"]
        for row in evaluate(model, sets)
    }
    seconds = time.perf_counter() - start
    stats = model_stats(model.config, MACS_TOKENS)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "parameters": stats.parameters,
        "macs": stats.macs,
        "perplexities": perplexities,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(device),
        "generated": tokenizer.decode(output[0], skip_special_tokens=True),
    }


def measure_in_new_process(args: argparse.Namespace, model_path: str) -> dict[str, Any]:
    """:func:`measure` of ``model_path`` in a new process.

    Raises:
        SystemExit: if the process fails; the process has printed the error.
        UserError: if the process is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, model_path, model_path]
        command += ["--eval_datasets", *args.eval_datasets]
        command += ["--eval_seqlens", *map(str, args.eval_seqlens)] if args.eval_seqlens else []
        command += ["--bos", args.bos, "--prompt", args.prompt, "--device", args.device, "--dtype", args.dtype]
        command += ["--trust_remote_code"] if args.trust_remote_code else []
        code = subprocess.run([*command, "--measure_to", str(result)], check=False).returncode
        if code < 0:
            raise UserError(f"{model_path}: the measuring process was killed by signal {-code}")
        if code:
            sys.exit(code)
        return json.loads(result.read_text(encoding="utf-8"))


def table(models: dict[str, dict[str, Any]]) -> str:
    """Text table of the models, with the ratio of each to the first."""
    measured = list(models.values())
    rows: list[Row] = [
        ("parameters (M)", *(model["parameters"] / 1e6 for model in measured)),
        (f"MACs, {MACS_TOKENS} tokens (G)", *(model["macs"] / 1e9 for model in measured)),
    ]
    rows += [(name, *(model["perplexities"][name] for model in measured)) for name in measured[0]["perplexities"]]
    rows.append(("evaluation (s)", *(model["seconds"] for model in measured)))
    for kind in measured[0]["peak_memory_mib"]:
        rows.append((f"peak {kind} memory (MiB)", *(model["peak_memory_mib"][kind] for model in measured)))
    return side_by_side(rows, tuple(models))


def main(args: argparse.Namespace) -> None:
    """Print the table and the generated sentences; with ``--measure_to``, measure a single model."""
    if args.measure_to:
        args.measure_to.write_text(json.dumps(measure(args)), encoding="utf-8")
        return
    args = process_args(args)
    models = {name: measure_in_new_process(args, path) for name, path in model_paths(args).items()}
    print(table(models))
    if args.out:
        settings = {"prompt": args.prompt, "dtype": args.dtype, "macs_seqlen": MACS_TOKENS}
        write_json_atomic(args.out, {**environment(choose_device(args.device)), **settings, **models})
    print()
    width = max(map(len, models)) + 1
    for name, model in models.items():
        print(f"{name + ':':<{width}} {' '.join(model['generated'].split())}")


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "compare_models.py")
