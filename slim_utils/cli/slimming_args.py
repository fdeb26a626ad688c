"""The flags of ``model_slimming.py`` that say what is pruned and on what; their defaults are ``PruningConfig``'s."""

import argparse
from pathlib import Path

from slim_utils.allocation.schedules import STRATEGIES
from slim_utils.common.bos import BOS_HELP, BOS_POLICIES
from slim_utils.pruning_config import BEST_COLUMN_GROUP, BEST_SINK_WINDOWS, SENSITIVITY

ALLOCATIONS = ("uniform", *STRATEGIES, SENSITIVITY)
PRESETS = ("paper", "best")


def add_calibration_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say what the model is calibrated on."""
    group.add_argument(
        "--data_file",
        nargs="+",
        metavar="FILE",
        help="local calibration text instead: txt, json[l], csv, tsv, parquet; several files or data sets give "
        "equally many samples each",
    )
    group.add_argument("--num_samples", type=int, help="calibration samples (default %(default)s)")
    group.add_argument("--seqlen", type=int, help="tokens of a sample (default %(default)s)")
    group.add_argument("--seed", type=int, help="of the choice of samples (default %(default)s)")
    group.add_argument("--bos", choices=BOS_POLICIES, help=BOS_HELP)


def add_budget_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say how much goes instead of the original's ratios."""
    group.add_argument("--target_ratio", type=float, help="share of the block weights to remove, to one FFN column")
    group.add_argument("--target_params", type=float, help="parameters to end with (such as 5.4e9), to one FFN column")
    group.add_argument(
        "--allocation", choices=ALLOCATIONS, help="how a target is spread over the layers (default: uniform)"
    )
    group.add_argument(
        "--refine",
        type=int,
        metavar="N",
        help="N times, move units between layers by what the pruned model would lose (default: %(default)s)",
    )
    group.add_argument(
        "--search_minutes",
        type=float,
        help="time to measure losses in, of --allocation search and of each --refine (default: as needed)",
    )
    group.add_argument("--profile", type=Path, help="pruning.json of another run, to keep as much of every layer")


def add_choice_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say how units are chosen, and one for all that helps."""
    group.add_argument("--exact_heads", action="store_true", help="score heads by the error that their removal leaves")
    group.add_argument(
        "--column_group", type=int, help="FFN columns of a step (default, and 0: the paper's dynamic group size)"
    )
    group.add_argument(
        "--sink_windows",
        "--text_starts",
        type=int,
        metavar="N",
        help="also calibrate on N 8-token windows cut from the samples, for attention sinks at position 0 (default: 0)",
    )
    best = f"--exact_heads --column_group {BEST_COLUMN_GROUP} --sink_windows {BEST_SINK_WINDOWS} (without a BOS)"
    best += " and, for a target, --allocation search"
    group.add_argument("--preset", choices=PRESETS, help=f"best: {best} (default: %(default)s)")
