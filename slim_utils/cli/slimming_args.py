"""Flags of ``model_slimming.py`` for calibration, budget and selection; the defaults are those of ``PruningConfig``."""

import argparse
from pathlib import Path

from slim_utils.allocation.schedules import STRATEGIES
from slim_utils.common.bos import BOS_HELP, BOS_POLICIES
from slim_utils.common.loading import DTYPES
from slim_utils.layerwise.device_defaults import CPU_TOKENS_PER_FORWARD, MAX_TOKENS_PER_FORWARD, SOLVE_DTYPES
from slim_utils.layerwise.settings import GQA_UNITS
from slim_utils.output.hub import add_hub_flags
from slim_utils.profiling.latency_table import WORKLOADS
from slim_utils.pruning_config import (
    BEST_COLUMN_GROUP,
    BEST_SINK_WINDOWS,
    DEFAULT_BATCH,
    DEFAULT_CONTEXT,
    DEFAULT_PROMPT,
    DEFAULT_WORKLOAD,
    EXPERT_UNITS,
    MACS_TOKENS,
    SENSITIVITY,
)

ALLOCATIONS = ("uniform", *STRATEGIES, SENSITIVITY)
PRESETS = ("paper", "best")


def add_calibration_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the calibration data."""
    group.add_argument(
        "--data_file",
        nargs="+",
        metavar="FILE",
        help="local calibration text: txt, json[l], csv, tsv, parquet; several files or data sets (FILE:WEIGHT or "
        "NAME:WEIGHT) contribute samples in proportion to their weights, 1 if left out",
    )
    group.add_argument("--num_samples", type=int, help="number of calibration samples (default: %(default)s)")
    group.add_argument("--seqlen", type=int, help="tokens per calibration sample (default: %(default)s)")
    group.add_argument("--seed", type=int, help="seed of the calibration samples (default: %(default)s)")
    group.add_argument("--bos", choices=BOS_POLICIES, help=BOS_HELP)


def add_ratio_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the original that set the pruning ratios."""
    group.add_argument("--sparsity", type=float, help="one pruning ratio for all layers (default: %(default)s)")
    group.add_argument("--non_uniform", action="store_true", help="a ratio per layer, from min to max")
    group.add_argument(
        "--non_uniform_strategy", choices=STRATEGIES, help="schedule of --non_uniform (default: %(default)s)"
    )
    group.add_argument("--min_sparsity", type=float, help="lowest ratio of a schedule (default: %(default)s)")
    group.add_argument("--max_sparsity", type=float, help="highest ratio of --non_uniform (default: %(default)s)")


def add_unit_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that set the unit of removal, alignment, range of layers and compensation."""
    group.add_argument(
        "--gqa_unit",
        choices=GQA_UNITS,
        help="unit of removal in grouped-query attention: the same number of query heads from every kv group, or whole "
        "groups (default: %(default)s)",
    )
    group.add_argument(
        "--expert_unit",
        choices=EXPERT_UNITS,
        help="unit of removal in mixtures of experts: columns of every expert, or whole experts, whose number every "
        "layer reduces alike, and nothing else (default: columns)",
    )
    group.add_argument("--multiple_of", type=int, help="every layer keeps a multiple of N FFN columns, or of N experts")
    group.add_argument("--even_heads", action="store_true", help="every layer keeps an even number of heads")
    group.add_argument("--tp_size", type=int, help="tensor-parallel GPUs that heads and FFN columns divide by")
    group.add_argument("--minlayer", type=int, help="first layer to prune")
    group.add_argument("--maxlayer", type=int, help="prune the layers before this one")
    group.add_argument(
        "--no_compensate", action="store_true", help="zero the pruned weights without updating the remaining ones"
    )
    group.add_argument("--percdamp", type=float, help="damping of the Hessian (default: %(default)s)")


def add_machine_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of device, memory and dtype."""
    group.add_argument("--device", help="auto, cuda, cuda:N or cpu (default: %(default)s)")
    group.add_argument("--cache_dev", help="cuda or cpu: device of the activations between layers (default: --device)")
    group.add_argument(
        "--batch_samples", type=int, help="samples moved from --cache_dev to --device at once (default: %(default)s)"
    )
    group.add_argument(
        "--tokens_per_forward",
        type=int,
        help=f"tokens of a forward of one layer (default: {CPU_TOKENS_PER_FORWARD} on a CPU, up to "
        f"{MAX_TOKENS_PER_FORWARD} on a GPU by its free memory)",
    )
    group.add_argument(
        "--solve_dtype",
        choices=("auto", *SOLVE_DTYPES),
        help="precision of the solver (default: float64, or float32 on a GPU with slow fp64; a solve in float32 that "
        "fails its check is repeated in float64 on the CPU)",
    )
    group.add_argument("--stream", action="store_true", help="for models larger than memory: one layer at a time")
    group.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (auto: as stored)")
    group.add_argument(
        "--family_like",
        metavar="TYPE",
        help="for a model type that is not supported: prune it as one with the layout of TYPE, if a check on a random "
        "model passes",
    )
    group.add_argument(
        "--text_only",
        action="store_true",
        help="of a multimodal model, save the pruned language model alone, without its vision tower",
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run model code found in the checkpoint")


def add_output_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the output folder and of publishing it."""
    group.add_argument("--save_dir", help="output folder (default: nothing is saved)")
    group.add_argument("--save_pruned_weights", action="store_true", help="also save the pruned model")
    group.add_argument(
        "--uniform_shapes", action="store_true", help="the pruned model is a stock checkpoint, without custom code"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the --save_dir of an earlier run")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run of the same --save_dir")
    group.add_argument(
        "--keep_activations",
        type=float,
        metavar="GIB",
        help="disk space for the activations that spare --resume the finished layers; 0 for none (default: a tenth of "
        "the free space)",
    )
    add_hub_flags(group)


def add_budget_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of an overall target and of its allocation to the layers."""
    group.add_argument(
        "--target_ratio",
        type=float,
        help="overall target as a fraction of the block parameters to remove, met to within one FFN column",
    )
    group.add_argument(
        "--target_params",
        type=float,
        help="overall target as a parameter count (such as 5.4e9), met to within one FFN column",
    )
    group.add_argument(
        "--target_macs",
        metavar="N|0.8x",
        help=f"overall target in multiply-accumulates of a forward of {MACS_TOKENS} tokens (3.2G), or as a share",
    )
    group.add_argument(
        "--target_memory",
        metavar="SIZE|0.8x",
        help="overall target in bytes (6GiB) of the weights and the KV cache of --at_context tokens, or as a share",
    )
    group.add_argument(
        "--target_latency", metavar="TIME|0.8x", help="overall target in measured latency (12ms), or as a share"
    )
    group.add_argument(
        "--latency_of", choices=WORKLOADS, help=f"what --target_latency counts (default: {DEFAULT_WORKLOAD})"
    )
    group.add_argument(
        "--latency_file",
        type=Path,
        metavar="FILE",
        help="table of test_flops.py --latency_table for --target_latency (default: measured first)",
    )
    group.add_argument(
        "--at_context",
        type=int,
        help=f"tokens of a sequence for --target_memory (default: {DEFAULT_CONTEXT}), or of a prompt for "
        f"--target_latency (default: {DEFAULT_PROMPT})",
    )
    group.add_argument(
        "--at_batch", type=int, help=f"sequences for --target_memory and --target_latency (default: {DEFAULT_BATCH})"
    )
    group.add_argument(
        "--allocation", choices=ALLOCATIONS, help="how a target is allocated to the layers (default: uniform)"
    )
    group.add_argument(
        "--refine",
        type=int,
        metavar="N",
        help="rounds of moving units between layers by their effect on the pruned model (default: %(default)s)",
    )
    group.add_argument(
        "--search_minutes",
        type=float,
        help="time limit of the sensitivity analysis of --allocation search and of each --refine round; the remaining "
        "layers are interpolated (default: no limit)",
    )
    group.add_argument("--profile", type=Path, help="pruning.json of another run, whose per-layer sizes are reused")


def add_choice_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of unit selection, and ``--preset``."""
    group.add_argument("--exact_heads", action="store_true", help="score heads by the exact error of their removal")
    group.add_argument(
        "--column_group",
        type=int,
        help="FFN columns removed per step (default, and 0: the paper's dynamic group size)",
    )
    group.add_argument(
        "--sink_windows",
        "--text_starts",
        type=int,
        metavar="N",
        help="also calibrate on N 8-token windows cut from the samples, for attention sinks at position 0 (default: 0)",
    )
    best = f"--exact_heads --column_group {BEST_COLUMN_GROUP} --sink_windows {BEST_SINK_WINDOWS} (without a BOS)"
    best += " and, with a target, --allocation search"
    group.add_argument("--preset", choices=PRESETS, help=f"best: {best} (default: %(default)s)")
