"""Time and memory of pruning: this suite against the original's procedure, alternating in one run.

    python -m benchmarks.bench_prune SmolLM2-135M-Instruct --num_samples 32 --seqlen 512 --layers 12 \
        --out benchmarks/results/bench_prune_smollm2.json
    python -m benchmarks.bench_prune llama-1b --num_samples 16 --seqlen 512 --layers 2 \
        --out benchmarks/results/bench_prune_llama_1b.json
    python -m benchmarks.bench_prune llama-1b --num_samples 16 --seqlen 512 --layers 2 --ways ours ours_fine \
        --column_group 32 --out benchmarks/results/bench_prune_llama_1b_groups_of_32.json
    python -m benchmarks.bench_prune llama-7b --num_samples 128 --seqlen 2048 --layers 32 --dtype bfloat16 \
        --device cuda --out benchmarks/results/bench_prune_gpu.json

MODEL is a LLaMA checkpoint folder, or a name of ``SHAPES`` with random weights. Only the first --layers are built and
pruned, by --sparsity, whole kv groups, damping 0.01, on random tokens, without loading and saving. Every measurement
runs in its own process: --repeats of each procedure, alternating, then half the samples and half the layers, to show
how the cost scales. The parts of this suite (forward, Hessian, solve) are recorded with their floating-point
operations. The third procedure is this suite with exact head scores and columns in groups of --column_group.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import original_slimgpt
from benchmarks.measuring import measure_in_new_process
from slim_utils.allocation.planner import plans_of
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.loading import DTYPES, choose_device, peak_memory_mib
from slim_utils.common.random_model import random_model
from slim_utils.families import find_family
from slim_utils.layerwise.device_defaults import SOLVE_DTYPES, model_tokens_per_forward, resolve_solve_dtype
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.obs import PAPER_SELECTION, SelectionOptions
from slim_utils.slimgpt import SlimGPT

logger = logging.getLogger("bench_prune")

PERCDAMP, SEED = 0.01, 0
SETTINGS = ("num_samples", "seqlen", "layers", "sparsity", "dtype", "solve_dtype", "column_group")
WAYS = ("original", "ours", "ours_fine")

SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(
        prog="bench_prune.py", description="Time and memory of pruning, this suite and the original."
    )
    parser.add_argument("model", help=f"checkpoint folder, or one of {', '.join(SHAPES)} with random weights")
    parser.add_argument("--num_samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6, help="number of layers (the first ones)")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "auto"], default="float32")
    parser.add_argument("--solve_dtype", choices=("auto", *SOLVE_DTYPES), default="auto", help="ours only")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache_dev", help="device of cached activations, ours only (default: --device)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--column_group", type=int, default=16, help="columns per step of ours_fine")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def shape_config(args: argparse.Namespace) -> PreTrainedConfig:
    """Configuration of the first ``--layers`` layers."""
    config = LlamaConfig(**SHAPES[args.model]) if args.model in SHAPES else AutoConfig.from_pretrained(args.model)
    if config.model_type != "llama":
        raise UserError(f"{args.model}: only LLaMA is supported, not {config.model_type}")
    config.num_hidden_layers = min(args.layers, config.num_hidden_layers)
    return config


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """The model, on the CPU."""
    config, dtype = shape_config(args), DTYPES[args.dtype]
    if args.model not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=dtype).eval()
    return random_model(config, dtype, torch.device("cpu"), SEED)


class Stopwatch:
    """Seconds spent in functions, with the device synchronised before and after each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Clock in seconds, read after synchronising the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its seconds accumulated under ``name``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

        return call


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement: seconds, their parts (ours only), peak memory."""
    device = choose_device(args.device)
    model = make_model(args)
    layers = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randint(0, model.config.vocab_size, (args.num_samples, args.seqlen), generator=generator)
    ratios = [args.sparsity] * layers
    watch = Stopwatch(device)
    if args.measure == "original":
        model = model.to(device)
        start = watch.now()
        original_slimgpt.prune_model(model, samples, ratios, PERCDAMP)
        seconds = watch.now() - start
    else:
        cache_dev = choose_device(args.cache_dev, "--cache_dev") if args.cache_dev else device
        SlimGPT.add_batch = watch.timed("hessian", SlimGPT.add_batch)
        SlimGPT.struct_prune = watch.timed("solve", SlimGPT.struct_prune)
        selection = SelectionOptions(True, args.column_group) if args.measure == "ours_fine" else PAPER_SELECTION
        settings = PruningSettings(
            device,
            cache_dev,
            percdamp=PERCDAMP,
            selection=selection,
            gqa_unit="kv_group",
            tokens_per_forward=model_tokens_per_forward(model, device, cache_dev, samples.numel()),
            solve_dtype=resolve_solve_dtype(args.solve_dtype, device),
        )
        start = watch.now()
        plans = plans_of(model, ratios, settings)
        prune_layers(model, find_family(model.config), samples, plans, settings)
        seconds = watch.now() - start
    parts = watch.seconds | ({"forward": seconds - sum(watch.seconds.values())} if watch.seconds else {})
    return {"seconds": seconds, "parts": parts, "peak_memory_mib": peak_memory_mib(device)}


def operations(args: argparse.Namespace) -> dict[str, float]:
    """Minimum floating-point operations of each part, over all layers.

    Forward: every weight once per token, and causal attention. Hessian: half of a symmetric product for each of the two
    maps. Solve: :func:`solver_operations`.
    """
    config = shape_config(args)
    tokens, hidden, columns = args.num_samples * args.seqlen, config.hidden_size, config.intermediate_size
    kv_share = config.num_key_value_heads / config.num_attention_heads
    weights = hidden * hidden * (2 + 2 * kv_share) + 3 * hidden * columns
    attention = 2 * args.seqlen * hidden
    solve = sum(solver_operations(n, hidden, round(args.sparsity * n)) for n in (hidden, columns))
    layers = config.num_hidden_layers
    return {
        "forward": layers * tokens * (2 * weights + attention),
        "hessian": layers * tokens * (hidden**2 + columns**2),
        "solve": layers * solve,
    }


def solver_operations(columns: int, rows: int, pruned: int) -> float:
    """Minimum operations of one solve: inverse (n³), a panel per pruned column (n k²), the weights (2 out n k)."""
    return columns**3 + columns * pruned**2 + 2 * rows * columns * pruned


def measure_in_subprocess(args: argparse.Namespace, way: str, **changes: int) -> dict[str, Any]:
    """:func:`measure` of the procedure ``way`` in a new process, with some arguments changed."""
    argv = [args.model, "--measure", way, "--device", args.device]
    argv += ["--cache_dev", args.cache_dev] if args.cache_dev else []
    for name in SETTINGS:
        argv += [f"--{name}", changes.get(name, getattr(args, name))]
    result = measure_in_new_process(__file__, argv, way)
    logger.info("%s %s: %.2f s, peak %s", way, changes or "", result["seconds"], result["peak_memory_mib"])
    return result


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product; median of five."""
    size, watch, rates = (8192 if device.type == "cuda" else 2048), Stopwatch(device), []
    a = torch.randn(size, size, device=device).to(dtype)
    for _ in range(5):
        start = watch.now()
        torch.mm(a, a)
        rates.append(2 * size**3 / (watch.now() - start))
    return statistics.median(rates)


def main(args: argparse.Namespace) -> None:
    """Measure all procedures alternately and write ``--out``; with ``--measure``, run a single measurement."""
    if args.measure:
        write_json_atomic(args.out, measure(args))
        return
    check_output_file(args.out, args.overwrite, "--out")
    if "ours" not in args.ways:
        raise UserError("--ways: ours is the reference of the comparison; add it")
    if min(args.layers, args.num_samples) < 2 or args.repeats < 1:
        raise UserError("--layers and --num_samples: at least 2, --repeats at least 1")
    device = choose_device(args.device)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for _ in range(args.repeats):
        for way, measured in runs.items():
            measured.append(measure_in_subprocess(args, way))
    medians = {way: statistics.median(run["seconds"] for run in measured) for way, measured in runs.items()}
    half = {"num_samples": args.num_samples // 2}, {"layers": args.layers // 2}
    growth = [{**changes, "seconds": measure_in_subprocess(args, "ours", **changes)["seconds"]} for changes in half]
    floor = operations(args)
    parts = min(runs["ours"], key=lambda run: abs(run["seconds"] - medians["ours"]))["parts"]
    record = {
        "command": command_line(),
        "seed": SEED,
        **environment(device),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "gemm_operations_per_second": {name: gemm_rate(device, DTYPES[name]) for name in {args.dtype, "float32"}},
        "median_seconds": medians,
        "speed_up": medians["original"] / medians["ours"] if "original" in medians else None,
        "cost_of_fine_choices": medians["ours_fine"] / medians["ours"] - 1 if "ours_fine" in medians else None,
        "parts": {name: {"seconds": parts[name], "operations": floor[name]} for name in floor},
        "ours_with_less": growth,
        "runs": runs,
    }
    write_json_atomic(args.out, record)
    logger.info("%s, speed-up %s", medians, record["speed_up"])


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_prune.py")
