"""Seconds and memory of the solver alone: one map of an FFN, against the original's procedure, in turns in one run.

    python -m benchmarks.bench_solver --columns 1536 5632 11008 --out benchmarks/results/bench_solver.json
    python -m benchmarks.bench_solver --columns 11008 28672 --ways ours --device cuda \
        --out benchmarks/results/bench_solver_gpu.json

A map has --columns inputs, as many outputs as in the LLaMA of that width, random weights, and the Hessian of random
activations. --sparsity of its columns are pruned by the paper's choice, damping 0.01. Each measurement is in a process
of its own, --repeats of each in turns. ``floor_seconds`` is the time of the operations at the rate of a large matrix
product in the same dtype, measured in the same run.
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import original_slimgpt
from benchmarks.bench_prune import PERCDAMP, SEED, Stopwatch, gemm_rate, solver_operations
from benchmarks.measuring import measure_in_new_process
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import choose_device, peak_memory_mib
from slim_utils.layerwise.device_defaults import SOLVE_DTYPES
from slim_utils.obs import solve_bytes
from slim_utils.profiling.tables import markdown_table
from slim_utils.slimgpt import SlimGPT

logger = logging.getLogger("bench_solver")

# Outputs of the maps of SmolLM2-135M and of LLaMA of 1B, 7B and 70B.
ROWS = {1536: 576, 5632: 2048, 11008: 4096, 28672: 8192}
WAYS = ("original", "ours")
# Samples and tokens that the Hessian is made of.
NUM_SAMPLES, SEQLEN = 4, 512


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = ArgumentParser(prog="bench_solver.py", description="Seconds and memory of the solver alone.")
    parser.add_argument("--columns", type=int, nargs="+", choices=ROWS, default=list(ROWS)[:3])
    parser.add_argument("--dtypes", nargs="+", choices=SOLVE_DTYPES, default=list(SOLVE_DTYPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def make_pruner(columns: int, device: torch.device) -> SlimGPT:
    """A map with random weights, and the Hessian of random activations of unlike scales."""
    generator = torch.Generator().manual_seed(SEED)
    linear = nn.Linear(columns, ROWS[columns], bias=False)
    linear.weight.data.normal_(0, 0.02, generator=generator)
    pruner = SlimGPT(linear.to(device), f"{columns} columns")
    scale = torch.logspace(-1, 1, columns)
    for _ in range(NUM_SAMPLES):
        pruner.add_batch((torch.randn(SEQLEN, columns, generator=generator) * scale).to(device))
    return pruner


def original(linear: nn.Linear, hessian: Tensor, count: int, dtype: torch.dtype) -> None:
    """The original's procedure, in ``dtype``."""
    weight = original_slimgpt.prune_columns(linear.weight.to(dtype), hessian.to(dtype), count, 1, PERCDAMP)
    linear.weight.data.copy_(weight)


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement: seconds, peak memory."""
    device, columns, dtype = choose_device(args.device), args.columns[0], SOLVE_DTYPES[args.dtypes[0]]
    pruner, watch, count = make_pruner(columns, device), Stopwatch(device), round(args.sparsity * columns)
    hessian = pruner.hessian
    # Libraries load what they need at their first call.
    original(nn.Linear(256, 8, device=device), torch.eye(256, device=device), 64, dtype)
    start = watch.now()
    if args.measure == "original":
        original(pruner.linear, hessian, count, dtype)
    else:
        result = pruner.struct_prune(count, percdamp=PERCDAMP, solve_dtype=dtype)
        place = SOLVE_DTYPES[result.solve_dtype], torch.device(result.solve_device).type, result.percdamp
        if place != (dtype, device.type, PERCDAMP):
            raise UserError(f"{columns} columns: solved with {place}, not as requested")
    return {"seconds": watch.now() - start, "peak_memory_mib": peak_memory_mib(device)}


def measure_apart(args: argparse.Namespace, way: str, columns: int, dtype: str) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    words = ["--measure", way, "--columns", columns, "--dtypes", dtype, "--sparsity", args.sparsity]
    result = measure_in_new_process(__file__, [*words, "--device", args.device], f"{way}, {columns} columns, {dtype}")
    logger.info("%s, %d columns, %s: %.2f s, peak %s", way, columns, dtype, *result.values())
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The table in docs/results.md."""
    lines = []
    for row in rows:
        medians, floor = row["median_seconds"], row["floor_seconds"]
        seconds = [f"{medians[way]:.2f}" if way in medians else "" for way in WAYS]
        ratio = f"{medians['original'] / medians['ours']:.1f}×" if "original" in medians else ""
        size = f"{row['columns']} → {row['outputs']}"
        lines.append((size, row["dtype"], *seconds, ratio, f"{floor:.2f}", f"{medians['ours'] / floor:.1f}×"))
    return markdown_table(("map", "dtype", "original (s)", "this suite (s)", "", "floor (s)", "of the floor"), lines)


def main(args: argparse.Namespace) -> None:
    """Measure in turns and write, or be the process that measures."""
    if args.measure:
        write_json_atomic(args.out, measure(args))
        return
    check_output_file(args.out, args.overwrite, "--out")
    device, rows = choose_device(args.device), []
    rates = {name: gemm_rate(device, SOLVE_DTYPES[name]) for name in args.dtypes}
    for columns in args.columns:
        for dtype in args.dtypes:
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
            for _ in range(args.repeats):
                for way, measured in runs.items():
                    measured.append(measure_apart(args, way, columns, dtype))
            count = round(args.sparsity * columns)
            operations = solver_operations(columns, ROWS[columns], count)
            medians = {way: statistics.median(run["seconds"] for run in measured) for way, measured in runs.items()}
            row = {"columns": columns, "outputs": ROWS[columns], "pruned": count, "dtype": dtype}
            row |= {"operations": operations, "floor_seconds": operations / rates[dtype], "median_seconds": medians}
            row["solve_mib"] = solve_bytes(columns, ROWS[columns], count, SOLVE_DTYPES[dtype]) / 2**20
            rows.append(row | {"runs": runs})
    settings = {"sparsity": args.sparsity, "num_samples": NUM_SAMPLES, "seqlen": SEQLEN, "percdamp": PERCDAMP}
    record = {"command": command_line(), "seed": SEED, **environment(device), "settings": settings}
    write_json_atomic(args.out, record | {"gemm_operations_per_second": rates, "rows": rows})


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_solver.py")
