"""Parameters, MACs and memory of a model, or of two models side by side with their latency; latency by layer size.

    python test_flops.py --base_model OUT/pruned_weights
    python test_flops.py --base_model DENSE --compare OUT/pruned_weights --batch_sizes 1 8 --lengths 128 1024
    python test_flops.py --base_model DENSE --latency_table latency.json --device cuda --dtype bfloat16

One model: parameters, multiply-accumulates of a (1, seqlen) forward by torch's FLOP counter, bytes of the weights and
of the KV cache, and a table of the layers; only the configuration is read. Two models: the same figures side by side,
and prefill and decode latency, measured alternately on the chosen device. --latency_table times layers by their heads
and FFN columns, for model_slimming.py --target_latency.

Limits: supported families only; unless --skip_latency, both models have to fit on the device together. For a table,
a model with fewer than eight layers of a kind is there several times.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slim_utils.allocation.latency_measurement import measure_latency_table
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import num_positions
from slim_utils.common.loading import DTYPES, choose_device, load_config, load_model
from slim_utils.layerwise.settings import GQA_UNITS
from slim_utils.profiling.latency import Latency, measure_latency
from slim_utils.profiling.latency_table import LatencyCurve, TimedRequest
from slim_utils.profiling.model_stats import ModelStats, model_stats
from slim_utils.profiling.tables import Row, side_by_side, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger("test_flops")

HEADERS = ("base", "other")


def build_parser() -> argparse.ArgumentParser:
    """Parser with the flag of the original script and the later ones."""
    parser = ArgumentParser(prog="test_flops.py", description="MACs, parameters, memory and latency of a model.")
    parser.add_argument("--base_model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--compare", metavar="OTHER", help="second model, compared with the first")
    parser.add_argument("--seqlen", type=int, default=64, help="tokens of the counted forward (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code found in the checkpoint")
    parser.add_argument(
        "--latency_table", type=Path, metavar="FILE", help="measure the time of layers by heads and columns into FILE"
    )
    speed = parser.add_argument_group("latency, with --compare or --latency_table")
    speed.add_argument("--skip_latency", action="store_true", help="count only; no weights are loaded")
    speed.add_argument("--batch_sizes", nargs="+", type=int, help="sequences per batch (default: 1 8; 1 for a table)")
    speed.add_argument("--lengths", nargs="+", type=int, default=[128], help="prompt lengths (default: 128)")
    speed.add_argument(
        "--gqa_unit", choices=GQA_UNITS, help=f"unit of heads of a table, as for pruning (default: {GQA_UNITS[0]})"
    )
    speed.add_argument("--new_tokens", type=int, default=32, help="decoding steps (default: %(default)s)")
    speed.add_argument(
        "--repeats", type=int, default=5, help="runs that the median is taken over (default: %(default)s)"
    )
    speed.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="json file for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    return parser


def process_args(args: argparse.Namespace) -> argparse.Namespace:
    """Check ``args`` before anything is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    for name in ("seqlen", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    if args.gqa_unit and not args.latency_table:
        raise UserError("--gqa_unit is a part of --latency_table; add it, or leave --gqa_unit out")
    if args.latency_table and (args.compare or args.out):
        raise UserError(f"--latency_table is a run of its own; leave {'--compare' if args.compare else '--out'} out")
    args.batch_sizes = args.batch_sizes or ([1] if args.latency_table else [1, 8])
    for name in ("batch_sizes", "lengths"):
        if min(getattr(args, name)) < 1:
            raise UserError(f"--{name}: at least 1")
        if args.latency_table and len(getattr(args, name)) > 1:
            raise UserError(f"--{name}: a latency table has one; measure a table for each")
    if args.latency_table:
        check_output_file(args.latency_table, args.overwrite, "--latency_table")
    if args.out:
        check_output_file(args.out, args.overwrite, "--out")
    args.device = choose_device(args.device)
    return args


def size_figures(stats: ModelStats, seqlen: int) -> dict[str, float]:
    """Figures of the whole model, keyed by printed name and unit."""
    return {
        "parameters (M)": stats.parameters / 1e6,
        f"MACs, {seqlen} tokens (G)": stats.macs / 1e9,
        "weights (MiB)": stats.weight_bytes / (1 << 20),
        "KV cache (KiB/token)": stats.kv_cache_bytes / (1 << 10),
    }


def layer_table(stats: ModelStats) -> str:
    """Text table of heads, FFN columns, parameters, MACs and KV cache bytes, one row per layer."""
    rows = []
    for index, layer in enumerate(stats.layers):
        counts = (index, layer.shape.num_heads, layer.shape.num_kv_heads, layer.shape.num_columns)
        sizes = (f"{layer.parameters / 1e6:.3f}", f"{layer.macs / 1e6:.2f}", str(layer.kv_cache_bytes))
        rows.append((*map(str, counts), *sizes))
    return text_table(("layer", "heads", "kv heads", "columns", "params (M)", "MACs (M)", "KV bytes"), rows)


def latency_rows(latencies: list[Latency], batch_size: int, length: int) -> list[Row]:
    """Table rows of one batch size and prompt length for the ``latencies`` of the two models."""
    setting = f"batch {batch_size}, {length} tokens"
    prefill = [latency.prefill_seconds for latency in latencies]
    decode = [latency.decode_seconds for latency in latencies]
    figures = {
        "prefill (ms)": [1e3 * seconds for seconds in prefill],
        "prefill (tokens/s)": [batch_size * length / seconds for seconds in prefill],
        "decode (ms/step)": [1e3 * seconds for seconds in decode],
        "decode (tokens/s)": [batch_size / seconds for seconds in decode],
    }
    return [(f"{setting}: {name}", base, other) for name, (base, other) in figures.items()]


def latency_record(latency: Latency) -> dict[str, Any]:
    """Medians and individual runs, for ``--out``."""
    medians = {"prefill_seconds": latency.prefill_seconds, "decode_seconds": latency.decode_seconds}
    return {**medians, **asdict(latency)}


def check_positions(args: argparse.Namespace, configs: list[PreTrainedConfig]) -> None:
    """Check that the models have positions for the timed tokens.

    Raises:
        UserError: if not.
    """
    max_tokens = max(args.lengths) + args.new_tokens
    positions = min(map(num_positions, configs))
    if max_tokens > positions:
        raise UserError(f"--lengths and --new_tokens: {max_tokens} tokens, but the models have {positions} positions")


def curve_rows(name: str, curve: LatencyCurve) -> list[tuple[str, ...]]:
    """Rows of the printed latency table for one curve."""
    pairs = zip(curve.kept, curve.seconds, strict=True)
    return [(name, str(kept), f"{1e3 * part.prefill:.4f}", f"{1e3 * part.decode:.4f}") for kept, part in pairs]


def write_latency_table(args: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Measure a latency table, write it to ``--latency_table`` and print it."""
    check_positions(args, [config])
    request = TimedRequest(args.batch_sizes[0], args.lengths[0], args.new_tokens)
    dtype = (config.dtype or torch.float32) if args.dtype == "auto" else DTYPES[args.dtype]
    unit = args.gqa_unit or GQA_UNITS[0]
    logger.info("timing layers in %s, %s, heads by %s", str(dtype).removeprefix("torch."), request.text, unit)
    table = measure_latency_table(config, dtype, args.device, request, unit, args.repeats)
    write_json_atomic(args.latency_table, table.to_json())
    rows: list[tuple[str, ...]] = []
    for kind in table.kinds:
        layers = f"{len(kind.layers)} layers from {kind.layers[0]}"
        rows += [*curve_rows(f"{layers}: heads", kind.heads), *curve_rows(f"{layers}: columns", kind.columns)]
    rows.append(("outside of the layers", "", f"{1e3 * table.rest.prefill:.4f}", f"{1e3 * table.rest.decode:.4f}"))
    print(text_table(("", "kept", "prefill (ms)", "decode (ms/step)"), rows))


def measure(args: argparse.Namespace, configs: list[PreTrainedConfig]) -> list[dict[str, Any]]:
    """Latencies of both models at every batch size and prompt length."""
    check_positions(args, configs)
    models = [
        load_model(path, args.dtype, args.trust_remote_code).to(args.device) for path in (args.base_model, args.compare)
    ]
    results = []
    for batch_size, length in product(args.batch_sizes, args.lengths):
        logger.info("timing batch %d, prompts of %d tokens", batch_size, length)
        latencies = measure_latency(models, batch_size, length, args.new_tokens, args.repeats)
        results.append({"batch_size": batch_size, "length": length, "latencies": latencies})
    return results


def main(args: argparse.Namespace) -> None:
    """Count, measure latency, print the tables and write ``--out``; or measure a latency table."""
    args = process_args(args)
    paths = [args.base_model, *([args.compare] if args.compare else [])]
    configs = [load_config(path, args.trust_remote_code) for path in paths]
    if args.latency_table:
        write_latency_table(args, configs[0])
        return
    dtype = None if args.dtype == "auto" else DTYPES[args.dtype]
    stats = [model_stats(config, args.seqlen, dtype) for config in configs]
    figures = [size_figures(model, args.seqlen) for model in stats]
    timings = measure(args, configs) if args.compare and not args.skip_latency else []
    if args.compare:
        rows: list[Row] = [(name, value, figures[1][name]) for name, value in figures[0].items()]
        for timing in timings:
            rows += latency_rows(**timing)
        print(side_by_side(rows, HEADERS))
    else:
        print(layer_table(stats[0]), end="\n\n")
        print(text_table((), [(name, f"{value:.2f}") for name, value in figures[0].items()], widths=(24, 10)))
    if args.out:
        record = {
            "command": command_line(),
            **environment(args.device),
            "seqlen": args.seqlen,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "models": {path: asdict(model) for path, model in zip(paths, stats, strict=True)},
            "timings": [{**timing, "latencies": list(map(latency_record, timing["latencies"]))} for timing in timings],
        }
        write_json_atomic(args.out, record)


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "test_flops.py")
