"""What the flags of ``model_slimming.py`` ask for, in the terms of the walk."""

import argparse
import logging
import math
import os
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from slim_utils.allocation.budget import (
    LayerUnits,
    allocate_in_depth,
    block_weights,
    layer_units,
    read_profile,
    scaled_ratios,
)
from slim_utils.allocation.refinement import measure_around, refined_ratios
from slim_utils.allocation.schedules import STRATEGIES, LayerRatio, layer_range, layer_ratios, non_uniform_ratios
from slim_utils.allocation.sensitivity import Sublayer, loss_curves, measure, most_removable
from slim_utils.common.bos import BOS_HELP, BOS_POLICIES
from slim_utils.common.errors import UserError
from slim_utils.families import layer_shapes
from slim_utils.layerwise.offload import LayerHost
from slim_utils.layerwise.pruner import planned_masks
from slim_utils.layerwise.resume import LayerStore
from slim_utils.layerwise.settings import WalkSettings
from slim_utils.masks import LayerMask
from slim_utils.obs import Choices
from slim_utils.params_remove import stock_config
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.text_source import CALIBRATION_DATASETS

logger = logging.getLogger(__name__)

SEARCH = "search"
ALLOCATIONS = ("uniform", *STRATEGIES, SEARCH)
# What a search cannot do without, by the flag that takes it away.
SEARCH_NEEDS = {"stream": "the whole model in memory", "no_compensate": "compensation"}
PRESETS = ("paper", "best")
# Finer ones leave no smaller error (benchmarks/layer_choices.py) and take longer on wide layers.
BEST_COLUMN_GROUP = 32
# First tokens enough for nearly all others to be attention sinks as before.
BEST_TEXT_STARTS = 512
# What a resumed run may not change: all that its weights depend on; the text and the model by what they hold.
RESUMED_ARGUMENTS = (
    *("num_samples", "seqlen", "seed", "sparsity", "non_uniform", "non_uniform_strategy", "min_sparsity"),
    *("max_sparsity", "gqa_unit", "multiple_of", "even_heads", "tp_size", "minlayer", "maxlayer", "no_compensate"),
    *("target_ratio", "target_params", "allocation", "percdamp", "exact_heads", "column_group"),
    *("text_starts", "bos", "dtype", "uniform_shapes", "stream", "refine"),
)


def add_calibration_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say what the model is calibrated on."""
    group.add_argument(
        "--data_file",
        nargs="+",
        metavar="FILE",
        help="local calibration text instead: txt, json[l], csv, tsv, parquet; several files or data sets give "
        "equally many samples each",
    )
    group.add_argument("--num_samples", type=int, default=1024, help="calibration samples (default %(default)s)")
    group.add_argument("--seqlen", type=int, default=2048, help="tokens of a sample (default %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of the choice of samples (default %(default)s)")
    group.add_argument("--bos", choices=BOS_POLICIES, default="auto", help=BOS_HELP)


def calibration_texts(args: argparse.Namespace) -> list[str]:
    """Files and data sets that calibration samples are drawn from.

    Raises:
        UserError: if there is none, or one is neither a file nor a data set.
    """
    if args.data_file is None and args.dataset is None:
        raise UserError(f"give a data set ({', '.join(CALIBRATION_DATASETS)}) or --data_file FILE")
    for text in args.data_file or ():
        if not Path(text).is_file() and text not in CALIBRATION_DATASETS:
            raise UserError(f"--data_file {text}: no such file, and none of {', '.join(CALIBRATION_DATASETS)}")
    return args.data_file or [args.dataset]


def settle_text_starts(args: argparse.Namespace, bos: bool) -> None:
    """Leave the sink windows of ``--preset best`` out where the samples begin with a BOS, which is the sink there."""
    if args.text_starts is None:
        args.text_starts = BEST_TEXT_STARTS if args.preset == "best" and not bos else 0


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
        default=0,
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
        "--text_starts",
        type=int,
        help="also calibrate on N 8-token windows cut from the samples, for attention sinks at position 0 (default: 0)",
    )
    best = f"--exact_heads --column_group {BEST_COLUMN_GROUP} --text_starts {BEST_TEXT_STARTS} (without a BOS)"
    best += " and, for a target, --allocation search"
    group.add_argument("--preset", choices=PRESETS, default=PRESETS[0], help=f"best: {best} (default: %(default)s)")


def apply_preset(args: argparse.Namespace) -> None:
    """Put in place what ``--preset best`` stands for, where nothing else was asked for."""
    if args.preset == "paper":
        return
    args.exact_heads = True
    if args.column_group is None:
        args.column_group = BEST_COLUMN_GROUP
    if args.allocation or args.uniform_shapes or (args.target_ratio is None and args.target_params is None):
        return
    obstacles = [f"--{name}" for name in SEARCH_NEEDS if getattr(args, name)]
    if in_several_processes():
        obstacles.append("several processes")
    args.allocation = SEARCH
    if obstacles:
        do_without_search(args, " and ".join(obstacles))


def in_several_processes() -> bool:
    """Whether torchrun started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def replace_preset_search(args: argparse.Namespace, asked: str | None, config: PreTrainedConfig) -> None:
    """Put a schedule in place of the search of ``--preset best`` where the model of ``config`` cannot be searched.

    Args:
        args: of the command line, with the preset applied.
        asked: the ``--allocation`` that was given; it stays.
        config: of the model.

    Raises:
        UserError: if there is a flag for the search.
    """
    if asked or args.allocation != SEARCH or args.refine or not has_experts(config):
        return
    if args.search_minutes is not None:
        raise UserError("--search_minutes is the time of a search, which does not know mixtures of experts yet")
    do_without_search(args, "experts")


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a layer is a mixture of experts."""
    return any(shape.num_experts for shape in layer_shapes(config))


def do_without_search(args: argparse.Namespace, obstacle: str) -> None:
    """Put in place what ``--preset best`` stands for where there can be no search."""
    args.allocation = "log_increase"
    logger.warning("--preset best: no search with %s; --allocation log_increase instead", obstacle)


def check_budget(args: argparse.Namespace) -> None:
    """Check the flags of :func:`add_budget_flags` against each other and the others.

    Raises:
        UserError: naming the flag to change.
    """
    given = [name for name in ("target_ratio", "target_params", "profile") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} ask for different things; give one of them")
    ratios = [name for name in ("sparsity", "non_uniform") if getattr(args, name)]
    if given and ratios:
        raise UserError(f"--{given[0]} says how much goes; leave --{ratios[0]} out (--allocation has the strategies)")
    if args.allocation and not (given and given[0] != "profile"):
        raise UserError("--allocation spreads a target: add --target_ratio or --target_params")
    if given and args.max_sparsity:
        raise UserError(f"--{given[0]} says how much goes; leave --max_sparsity out")
    if given and args.min_sparsity and args.allocation not in STRATEGIES:
        raise UserError("--min_sparsity is where a strategy begins; add --allocation log_increase, or leave it out")
    if args.profile and (args.minlayer > 0 or args.maxlayer < 1000):
        raise UserError("--profile says which layers lose how much; leave --minlayer and --maxlayer out")
    if args.target_ratio is not None and not 0 < args.target_ratio < 1:
        raise UserError(f"--target_ratio {args.target_ratio}: more than 0 and less than 1")
    if args.uniform_shapes and (given and args.allocation not in (None, "uniform")):
        raise UserError("--uniform_shapes wants one ratio for all layers: --sparsity, or --allocation uniform")
    if args.refine < 0:
        raise UserError(f"--refine {args.refine}: at least 0")
    if args.refine and not (given and given[0] != "profile"):
        instead = " instead of --profile" if given else ""
        raise UserError(f"--refine moves units of a target: add --target_ratio or --target_params{instead}")
    if args.refine and args.uniform_shapes:
        raise UserError("--uniform_shapes wants one ratio for all layers: leave --refine out")
    if args.search_minutes is not None and not measures(args):
        raise UserError(
            "--search_minutes is the time of a search: add --allocation search or --refine, or leave it out"
        )
    if args.search_minutes is not None and not args.search_minutes >= 0:
        raise UserError(f"--search_minutes {args.search_minutes}: at least 0")
    if measures(args):
        flag = measuring_flag(args)
        for name, reason in SEARCH_NEEDS.items():
            if getattr(args, name):
                raise UserError(f"{flag} needs {reason}; leave --{name} out")
        if in_several_processes():
            raise UserError(f"{flag} runs in one process; search without torchrun, then give --profile")


def measures(args: argparse.Namespace) -> bool:
    """Whether losses are measured, which only the loaded model can tell."""
    return args.allocation == SEARCH or bool(args.refine)


def measuring_flag(args: argparse.Namespace) -> str:
    """The flag that asks for losses to be measured."""
    return "--refine" if args.refine else "--allocation search"


def plan(
    args: argparse.Namespace, host: LayerHost, settings: WalkSettings, ratios: list[LayerRatio] | None = None
) -> tuple[list[LayerRatio], list[LayerMask]]:
    """Pruning ratios of every layer, and masks of the sizes that they lead to; says what is odd about them.

    Args:
        args: of the command line.
        host: of the model, whose weights are not looked at.
        settings: how to walk.
        ratios: what a search has found.

    Raises:
        UserError: if the target, or a stock checkpoint, cannot be had.
    """
    ratios = ratios or chosen_ratios(args, host, settings)
    if not any(map(any, ratios)):
        logger.warning("nothing to prune: all ratios are 0; set --sparsity, or --non_uniform with --max_sparsity")
    planned = planned_masks(layer_shapes(host.model.config), ratios, settings)
    if args.uniform_shapes:
        stock_config(host.model.config, host.family, planned)
    settings.warn_of_unaligned(planned)
    return ratios, planned


def chosen_ratios(args: argparse.Namespace, host: LayerHost, settings: WalkSettings) -> list[LayerRatio]:
    """Pruning ratios of every layer without a search; arguments as for :func:`plan`.

    Raises:
        UserError: if the target cannot be met.
    """
    shapes, family = layer_shapes(host.model.config), host.family
    layers = layer_range(args.minlayer, args.maxlayer, len(shapes))
    units = layer_units(host.layers, family, shapes, settings)
    if args.profile:
        return read_profile(args.profile, units, shapes)
    if args.target_ratio is None and args.target_params is None:
        return [LayerRatio.of(ratio) for ratio in original_ratios(args, layers, len(shapes))]
    budget = weights_to_remove(args, host)

    def schedule(highest: float) -> list[float]:
        if args.allocation in (None, "uniform"):
            ratios = [highest] * len(layers)
        else:
            lowest = min(args.min_sparsity, highest)
            ratios = non_uniform_ratios(args.allocation, lowest, highest, len(layers))
        return layer_ratios(layers, len(shapes), ratios)

    return scaled_ratios(schedule, units, budget, settings.alike)


def weights_to_remove(args: argparse.Namespace, host: LayerHost) -> float:
    """Block weights that the target asks to remove, of a model whose weights are not looked at.

    Raises:
        UserError: if the model is smaller than the target.
    """
    if args.target_params is None:
        return args.target_ratio * block_weights(host.layers, host.family, layer_shapes(host.model.config))
    budget = count_parameters(host.model) - args.target_params
    if budget <= 0 or args.target_params <= 0:
        raise UserError(f"--target_params {args.target_params:g}: the model has {count_parameters(host.model)}")
    return budget


def check_search(args: argparse.Namespace, host: LayerHost, settings: WalkSettings) -> None:
    """Make sure, before anything is measured, that a search can be had and can meet the target.

    Weights are not looked at.

    Raises:
        UserError: if it cannot.
    """
    if has_experts(host.model.config):
        flag = measuring_flag(args)
        raise UserError(f"{flag} does not know mixtures of experts yet; use --allocation log_increase alone")
    shapes = layer_shapes(host.model.config)
    units = layer_units(host.layers, host.family, shapes, settings)
    most = most_removable(units, layer_range(args.minlayer, args.maxlayer, len(shapes)))
    budget = weights_to_remove(args, host)
    if args.allocation != SEARCH:
        chosen_ratios(args, host, settings)
    if most < budget:
        raise UserError(f"no more than {most} block weights can go, of {budget:.0f}; lower the target")


def search(
    args: argparse.Namespace,
    host: LayerHost,
    samples: Tensor,
    starts: Tensor | None,
    settings: WalkSettings,
    store: LayerStore | None,
) -> tuple[list[LayerRatio], dict[str, dict[int, list[Sublayer]]]]:
    """Pruning ratios of every layer by what pruning costs where, and what was measured, by the kind of measurement.

    Args:
        args: of the command line.
        host: of the whole dense model, which ends as it was.
        samples: (num_samples, seqlen) calibration token ids.
        starts: (count, few) beginnings of text besides.
        settings: how to walk.
        store: keeps what is measured, for a run that is cut off.

    Raises:
        UserError: as :func:`measure`, or if the target cannot be met.
    """
    shapes, found = layer_shapes(host.model.config), {}
    seconds = math.inf if args.search_minutes is None else 60 * args.search_minutes
    units, budget = layer_units(host.layers, host.family, shapes, settings), weights_to_remove(args, host)
    if args.allocation == SEARCH:
        layers = layer_range(args.minlayer, args.maxlayer, len(shapes))
        found["search"] = measure(host, samples, layers, settings, store and store.measured(), seconds)
        ratios = searched_ratios(found["search"], units, budget)
    else:
        ratios = chosen_ratios(args, host, settings)
    for number in range(1, args.refine + 1):
        kept = store and store.measured(number)
        found["refinement"] = measure_around(host, samples, starts, ratios, settings, kept, seconds)
        ratios = refined_ratios(found["refinement"], units, ratios, budget)
    return ratios, found


def searched_ratios(measured: dict[int, list[Sublayer]], units: list[LayerUnits], budget: float) -> list[LayerRatio]:
    """Ratios of all layers, of the least loss, that remove ``budget`` block weights of those that were measured.

    Raises:
        UserError: if the layers have fewer weights.
    """
    counts = dict(zip(sorted(measured), allocate_in_depth(loss_curves(measured, units), budget), strict=True))
    return [own.ratio(*counts.get(index, (0, 0))) for index, own in enumerate(units)]


def original_ratios(args: argparse.Namespace, layers: range, num_layers: int) -> list[float]:
    """Ratio of every layer by the original's flags."""
    if args.non_uniform:
        ratios = non_uniform_ratios(args.non_uniform_strategy, args.min_sparsity, args.max_sparsity, len(layers))
    else:
        ratios = [args.sparsity] * len(layers)
    return layer_ratios(layers, num_layers, ratios)


def walk_settings(args: argparse.Namespace) -> WalkSettings:
    """How to walk."""
    return WalkSettings(
        device=args.device,
        cache_dev=args.cache_dev,
        batch_samples=args.batch_samples,
        percdamp=args.percdamp,
        compensate=not args.no_compensate,
        choices=Choices(args.exact_heads, args.column_group or 0),
        gqa_unit=args.gqa_unit,
        heads_multiple=math.lcm(2 if args.even_heads else 1, args.tp_size),
        columns_multiple=math.lcm(args.multiple_of, args.tp_size),
        alike=args.uniform_shapes,
        tp_size=args.tp_size,
    )
