"""Perplexity of SmolLM2-135M at equal size, pruned by this suite, by the paper's procedure and by other methods.

    python -m benchmarks.bench_quality SmolLM2-135M-Instruct --calib_file wikitext2/valid.tokens.txt \
        --eval_files wikitext2=wikitext2/test.tokens.txt c4=c4/sample.jsonl ptb=ptb/valid.txt \
        --out benchmarks/results/bench_quality.json

Protocol: fp32; calibration on 32 × 512 tokens, random windows (--seeds) shared by all methods; perplexity of the first
8 × 1024 tokens of every evaluation text, no special tokens, 1023 targets per window. Nothing is tuned on these texts,
except that the loss of attention sinks (benchmarks/text_starts.py) was noticed on them. Shares are those of the
attention and MLP weights. Heads: ``repeated`` is multi-head attention (every query head has its own copy of the
key/value head), ``native`` is grouped-query attention, pruned by query heads.

Every row is measured in its own process, for its peak memory. Rows that are already in --out are not measured again,
so an interrupted benchmark can be resumed. A sensitivity analysis is reused at the other shares; its seconds are in the
row that ran it.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.baselines import prune_flap, prune_magnitude, prune_wanda_sp
from benchmarks.measuring import eval_sets, measure_in_new_process, measure_missing_rows
from benchmarks.smollm2_perplexity import NUM_SAMPLES, PERCDAMP, SEQLEN, repeat_kv_heads
from ppl_eval.ppl_eval import perplexity
from slim_utils.allocation.planner import Planner, no_cache
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.loading import load_model, load_tokenizer, peak_memory_mib
from slim_utils.families import find_family
from slim_utils.layerwise.offload import CPU, ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask
from slim_utils.profiling.model_stats import removed_share
from slim_utils.pruning_config import BEST_COLUMN_GROUP, BEST_SINK_WINDOWS, SENSITIVITY, PruningConfig
from slim_utils.slim_dataset import load_calibration, sink_windows
from slim_utils.text_mixture import TextSource

logger = logging.getLogger("bench_quality")

EVAL_WINDOWS, EVAL_SEQLEN = 8, 1024
MIN_SPARSITY = 0.0625
LOG_INCREASE = {"allocation": "log_increase", "min_sparsity": MIN_SPARSITY}
PAPER = PruningConfig(device="cpu", cache_dev="cpu", percdamp=PERCDAMP)
FINE = replace(PAPER, exact_heads=True, column_group=BEST_COLUMN_GROUP)
# --preset best for a model whose samples have no BOS.
BEST = replace(FINE, allocation=SENSITIVITY, sink_windows=BEST_SINK_WINDOWS)
HEADS = ("repeated", "native")

Pruner = Callable[[PreTrainedModel, Tensor, float, PruningSettings, Path], list[LayerMask]]


def planner(config: PruningConfig, model: PreTrainedModel) -> Planner:
    """Planner of a run with ``config`` on ``model``."""
    return Planner(config, ResidentModel(model, find_family(model.config)))


def prune_with(
    config: PruningConfig,
    model: PreTrainedModel,
    samples: Tensor,
    cache: Callable[[int], Path | None] = no_cache,
) -> list[LayerMask]:
    """Prune ``model`` in place like a run with ``config``; ``cache`` as for :meth:`Planner.measured_plans`."""
    starts = sink_windows(samples, config.sink_windows) if config.sink_windows else None
    run = planner(config, model)
    plans = run.measured_plans(samples, starts, cache)[0] if config.measures else run.plans()
    return prune_layers(model, find_family(model.config), samples, plans, run.settings, starts=starts)[0]


def slimgpt(config: PruningConfig) -> Pruner:
    """SlimGPT with ``config`` and a target ratio; the sensitivity analysis of a model is cached for other targets."""

    def prune(
        model: PreTrainedModel, samples: Tensor, share: float, settings: PruningSettings, cache_file: Path
    ) -> list[LayerMask]:
        return prune_with(replace(config, target_ratio=share), model, samples, {0: cache_file}.get)

    return prune


def uniform_counts(model: PreTrainedModel, share: float) -> list[list[int]]:
    """Numbers of head units and columns to remove per layer with a uniform ratio, within one column of ``share``."""
    uniform = planner(replace(PAPER, target_ratio=share), model)
    return [list(units.counts(plan)) for units, plan in zip(uniform.units, uniform.plans(), strict=True)]


def without_cache(function: Callable[..., list[LayerMask]]) -> Pruner:
    """``function`` as a pruner that ignores the cache file."""
    return lambda model, samples, share, settings, cache_file: function(model, samples, share, settings)


METHODS: dict[str, Pruner] = {
    "magnitude": without_cache(
        lambda model, samples, share, settings: prune_magnitude(model, uniform_counts(model, share))
    ),
    "wanda_sp": without_cache(
        lambda model, samples, share, settings: prune_wanda_sp(model, samples, uniform_counts(model, share), settings)
    ),
    "flap": without_cache(prune_flap),
    "slimgpt_uniform": slimgpt(replace(PAPER, allocation="uniform")),
    "slimgpt_log_increase": slimgpt(replace(PAPER, **LOG_INCREASE)),
    "fine_log_increase": slimgpt(replace(FINE, **LOG_INCREASE)),
    "best": slimgpt(BEST),
    "refined": slimgpt(replace(BEST, refine=1)),
}
# Methods without calibration data.
WITHOUT_SEED = ("magnitude",)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags; the rest of the protocol is fixed."""
    parser = ArgumentParser(prog="bench_quality.py", description="Perplexity of pruning methods at equal size.")
    parser.add_argument("model", help="SmolLM2-135M as a checkpoint folder")
    parser.add_argument("--calib_file", type=Path, required=True)
    parser.add_argument("--eval_files", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.33, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["repeated"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row, for the first element of every list argument; the dense model for share 0."""
    heads, method, share, seed = args.heads[0], args.methods[0], args.shares[0], args.seeds[0]
    model, tokenizer = load_model(args.model, "float32", False), load_tokenizer(args.model, False)
    sets = eval_sets(tokenizer, args.eval_files, EVAL_WINDOWS, EVAL_SEQLEN)
    if heads == "repeated":
        model = repeat_kv_heads(model)
    row: dict[str, Any] = {"heads": heads, "share": share, "method": method if share else "dense", "seed": seed}
    if share:
        data = load_calibration([TextSource(str(args.calib_file))], tokenizer, NUM_SAMPLES, SEQLEN, seed)
        start, cache_file = time.perf_counter(), args.measure / f"{heads}-{seed}.json"
        masks = METHODS[method](model, data.samples, share, PruningSettings(CPU, CPU, percdamp=PERCDAMP), cache_file)
        row["seconds"] = round(time.perf_counter() - start, 1)
        row["samples_sha256"] = data.sha256
        family = find_family(model.config)
        row["share_removed"] = removed_share(family.decoder_layers(model), family, masks)
        row["profile"] = [[len(mask.kept_heads), len(mask.kept_columns)] for mask in masks]
    # Before the evaluation: peak memory of the method.
    row["peak_memory_mib"] = peak_memory_mib(CPU)
    row["perplexity"] = {name: perplexity(model, windows, batch_size=2) for name, windows in sets.items()}
    return row


def main(args: argparse.Namespace) -> None:
    """Measure the missing rows; with ``--measure``, measure a single row."""
    if args.measure:
        write_json_atomic(args.out, measure(args))
        return
    # Check the texts before the first row.
    eval_sets(load_tokenizer(args.model, False), args.eval_files, EVAL_WINDOWS, EVAL_SEQLEN)
    protocol = {"calibration": [NUM_SAMPLES, SEQLEN], "evaluation": [EVAL_WINDOWS, EVAL_SEQLEN], "percdamp": PERCDAMP}
    protocol |= {"texts": sorted(args.eval_files), "column_group": FINE.column_group}
    keys = [(heads, "dense", 0.0, 0) for heads in args.heads]
    for heads, method, share in product(args.heads, args.methods, args.shares):
        keys += [(heads, method, share, seed) for seed in ([0] if method in WITHOUT_SEED else args.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        names, measure_row = ("heads", "method", "share", "seed"), partial(measure_in_subprocess, args, Path(folder))
        measure_missing_rows(args.out, protocol, names, keys, measure_row)


def measure_in_subprocess(
    args: argparse.Namespace, folder: Path, heads: str, method: str, share: float, seed: int
) -> dict[str, Any]:
    """:func:`measure` in a new process; sensitivity analyses are cached in ``folder``."""
    argv = [args.model, "--calib_file", args.calib_file, "--eval_files", *args.eval_files, "--shares", share]
    argv += ["--seeds", seed, "--heads", heads, *(["--methods", method] if share else []), "--measure", folder]
    row = measure_in_new_process(__file__, argv, f"{method} at share {share}, seed {seed},")
    logger.info("%s, %s, share %.3f, seed %d: %s", heads, row["method"], share, seed, row["perplexity"])
    return row


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "bench_quality.py")
