"""Checks of the flags of ``model_slimming.py`` before anything is loaded, and the expansion of ``--preset``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.wrappers import TEXT_OF_KEY
from slim_utils.allocation.schedules import STRATEGIES
from slim_utils.allocation.targets import parse_size
from slim_utils.common.adapters import adapter_base, merged_models
from slim_utils.common.atomic_output import check_output
from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import check_inputs_outside, eval_files
from slim_utils.common.loading import choose_device, choose_local_device, is_multimodal_checkpoint, local_processes
from slim_utils.layerwise.distributed import launched_processes
from slim_utils.layerwise.resume import LayerStore
from slim_utils.pruning_config import BEST_COLUMN_GROUP, BEST_SINK_WINDOWS, SENSITIVITY, TARGET_FLAGS, PruningConfig
from slim_utils.text_mixture import TextSource, parse_text_sources
from slim_utils.text_source import CALIBRATION_DATASETS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Requirements of the sensitivity analysis, by the flag that rules each out.
SENSITIVITY_NEEDS = {"stream": "the whole model in memory", "no_compensate": "compensation"}
# Allocation of --preset best without a sensitivity analysis.
FALLBACK_ALLOCATION = "log_increase"


def calibration_texts(config: PruningConfig) -> list[TextSource]:
    """Files and data sets that the calibration samples are drawn from, with their weights.

    Raises:
        UserError: if none is given, or a data set beside ``--data_file``; if one is neither a file nor a data set, or
            is given twice, or a weight is not a positive number.
    """
    if config.data_file and config.dataset:
        mixture = f"--data_file {config.dataset} {' '.join(config.data_file)}"
        raise UserError(f"{config.dataset} and --data_file exclude each other; leave one out, or mix them: {mixture}")
    specs = config.data_file or ([config.dataset] if config.dataset else [])
    if not specs:
        raise UserError(f"give a data set ({', '.join(CALIBRATION_DATASETS)}) or --data_file FILE")
    sources = parse_text_sources("--data_file", specs)
    for source in sources:
        if not Path(source.name).is_file() and source.name not in CALIBRATION_DATASETS:
            raise UserError(f"--data_file {source.name}: neither a file nor one of {', '.join(CALIBRATION_DATASETS)}")
    return sources


def num_sink_windows(config: PruningConfig, bos: bool) -> int:
    """Number of sink windows; ``--preset best`` uses none if samples start with a BOS, which is then the sink."""
    if config.sink_windows is not None:
        return config.sink_windows
    return BEST_SINK_WINDOWS if config.preset == "best" and not bos else 0


def with_preset(config: PruningConfig) -> PruningConfig:
    """Return ``config`` with the flags that ``--preset best`` stands for; explicit flags take precedence."""
    if config.preset == "paper":
        return config
    group = BEST_COLUMN_GROUP if config.column_group is None else config.column_group
    config = replace(config, exact_heads=True, column_group=group)
    if config.allocation or config.uniform_shapes or not config.has_target:
        return config
    return replace(config, allocation=FALLBACK_ALLOCATION if _preset_obstacles(config) else SENSITIVITY)


def resolve_preset(config: PruningConfig) -> PruningConfig:
    """Return :func:`with_preset`, and log where it falls back to a schedule."""
    resolved = with_preset(config)
    if config.allocation is None and resolved.allocation == FALLBACK_ALLOCATION:
        obstacles = " and ".join(_preset_obstacles(config))
        message = "--preset best: no sensitivity analysis with %s; using --allocation %s"
        logger.warning(message, obstacles, FALLBACK_ALLOCATION)
    return resolved


def _preset_obstacles(config: PruningConfig) -> list[str]:
    """Return what rules out the sensitivity analysis of ``--preset best``."""
    obstacles = [f"--{name}" for name in SENSITIVITY_NEEDS if getattr(config, name)]
    if launched_processes() > 1:
        obstacles.append("several processes")
    return obstacles


def check_budget(config: PruningConfig) -> None:
    """Check the flags of ratios, targets and their allocation against each other.

    Raises:
        UserError: naming the flag to change.
    """
    targets = [flag.removeprefix("--") for flag in TARGET_FLAGS]
    given = [name for name in (*targets, "profile") if getattr(config, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other; give one of them")
    ratios = [name for name in ("sparsity", "non_uniform") if getattr(config, name)]
    if given and ratios:
        raise UserError(f"--{given[0]} sets the ratios; leave --{ratios[0]} out (--allocation has the strategies)")
    if config.allocation and not (given and given[0] != "profile"):
        raise UserError(f"--allocation needs a target: add {', '.join(TARGET_FLAGS[:-1])} or {TARGET_FLAGS[-1]}")
    if given and config.max_sparsity:
        raise UserError(f"--{given[0]} sets the ratios; leave --max_sparsity out")
    if given and config.min_sparsity and config.allocation not in STRATEGIES:
        raise UserError("--min_sparsity is the first ratio of a strategy; add --allocation log_increase or omit it")
    if config.profile and (config.minlayer > 0 or config.maxlayer < 1000):
        raise UserError("--profile sets the size of every layer; leave --minlayer and --maxlayer out")
    if config.target_ratio is not None and not 0 < config.target_ratio < 1:
        raise UserError(f"--target_ratio {config.target_ratio}: must be between 0 and 1, exclusive")
    check_size(config)
    if config.uniform_shapes and (given and config.allocation not in (None, "uniform")):
        raise UserError("--uniform_shapes needs one ratio for all layers: --sparsity, or --allocation uniform")
    if config.refine < 0:
        raise UserError(f"--refine {config.refine}: at least 0")
    if config.refine and not (given and given[0] != "profile"):
        instead = " instead of --profile" if given else ""
        raise UserError(f"--refine moves units of a target: add --target_ratio or another target{instead}")
    if config.refine and config.uniform_shapes:
        raise UserError("--uniform_shapes needs one ratio for all layers: leave --refine out")
    if config.search_minutes is not None and not config.measures:
        raise UserError(
            "--search_minutes limits a sensitivity analysis: add --allocation search or --refine, or leave it out"
        )
    if config.search_minutes is not None and not config.search_minutes >= 0:
        raise UserError(f"--search_minutes {config.search_minutes}: at least 0")
    if config.measures:
        flag = config.measuring_flag
        for name, reason in SENSITIVITY_NEEDS.items():
            if getattr(config, name):
                raise UserError(f"{flag} needs {reason}; leave --{name} out")
        if launched_processes() > 1:
            raise UserError(f"{flag} runs in one process; measure without torchrun, then give --profile")


def check_whole_experts(config: PruningConfig) -> None:
    """Check the flags against ``--expert_unit expert``: as many experts of every layer are removed, and nothing else.

    Raises:
        UserError: naming the flag to leave out.
    """
    alike = "removes as many experts from every layer"
    nothing_else = "prunes no heads and no columns"
    reasons = {
        "--preset": (config.preset != PruningConfig.preset, nothing_else),
        "--non_uniform": (config.non_uniform, alike),
        f"--allocation {config.allocation}": (config.allocation not in (None, "uniform"), alike),
        "--refine": (config.refine, alike),
        "--profile": (config.profile, alike),
        "--minlayer": (config.minlayer > 0, alike),
        "--maxlayer": (config.maxlayer < PruningConfig.maxlayer, alike),
        "--target_macs": (config.target_macs, "leaves the multiply-accumulates of a token nearly as they are"),
        "--target_latency": (config.target_latency, "leaves the time of a token nearly as it is"),
    }
    for name in ("gqa_unit", "even_heads", "tp_size", "exact_heads", "column_group"):
        reasons[f"--{name}"] = (getattr(config, name) != getattr(PruningConfig, name), nothing_else)
    for flag, (given, reason) in reasons.items():
        if given:
            raise UserError(f"--expert_unit expert {reason}; leave {flag} out")
    if config.save_dir and not config.save_pruned_weights:
        raise UserError(
            "--expert_unit expert saves the pruned model alone, for no weights of a router mask an expert: add "
            "--save_pruned_weights"
        )


def check_size(config: PruningConfig) -> None:
    """Check a target in multiply-accumulates, bytes or milliseconds, and the flags that belong to it.

    Raises:
        UserError: naming the flag to change.
    """
    if config.target_size is not None:
        parse_size(*config.target_size)
    for name in ("at_context", "at_batch"):
        value = getattr(config, name)
        if value is not None and config.target_memory is None and config.target_latency is None:
            raise UserError(f"--{name} is a part of --target_memory or --target_latency; add it, or leave --{name} out")
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1")
    for name in ("latency_of", "latency_file"):
        if getattr(config, name) is not None and config.target_latency is None:
            raise UserError(f"--{name} is a part of --target_latency; add it, or leave --{name} out")
    if config.latency_file and not config.latency_file.is_file():
        raise UserError(f"--latency_file {config.latency_file}: no such file")
    if config.target_latency is not None and not config.latency_file and launched_processes() > 1:
        raise UserError(
            "--target_latency measures in one process; measure with test_flops.py --latency_table, then give "
            "--latency_file"
        )


def check_ranges(config: PruningConfig) -> None:
    """Check the range of every numeric flag.

    Raises:
        UserError: naming the flag to change.
    """
    for name, lowest in (("num_samples", 1), ("seqlen", 2), ("batch_samples", 1), ("multiple_of", 1), ("tp_size", 1)):
        if getattr(config, name) < lowest:
            raise UserError(f"--{name} {getattr(config, name)}: at least {lowest}")
    for name in ("sparsity", "min_sparsity", "max_sparsity"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 0 and less than 1")
    for name in ("percdamp", "column_group", "sink_windows", "keep_activations"):
        if (getattr(config, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: at least 0")
    if config.tokens_per_forward is not None and config.tokens_per_forward < 1:
        raise UserError(f"--tokens_per_forward {config.tokens_per_forward}: at least 1")
    if any(seqlen < 2 for seqlen in config.eval_seqlens or ()):
        raise UserError("--eval_seqlens: at least 2")


def check_original_flags(config: PruningConfig) -> None:
    """Check the flags of the original script against each other, and log those without effect.

    Raises:
        UserError: naming the flag to change.
    """
    if config.min_sparsity > config.max_sparsity and not config.allocation:
        raise UserError(f"--min_sparsity {config.min_sparsity} is above --max_sparsity {config.max_sparsity}")
    if config.non_uniform and config.sparsity:
        logger.warning("--sparsity %g has no effect with --non_uniform", config.sparsity)
    if not config.non_uniform and config.max_sparsity:
        logger.warning("--min_sparsity and --max_sparsity have no effect without --non_uniform")


def check_output_flags(config: PruningConfig) -> None:
    """Check the output flags against each other.

    Raises:
        UserError: naming the flag to change.
    """
    if config.uniform_shapes and config.non_uniform:
        raise UserError("--uniform_shapes needs one ratio for all layers: --sparsity instead of --non_uniform")
    if config.uniform_shapes and not config.save_pruned_weights:
        raise UserError("--uniform_shapes applies to the pruned model: add --save_pruned_weights")
    if config.resume and not config.save_dir:
        raise UserError("--resume needs the --save_dir of the run to continue")
    if config.stream and not config.save_dir:
        raise UserError("--stream writes every layer as soon as it is pruned: give --save_dir DIR")
    if config.save_pruned_weights and not config.save_dir:
        raise UserError("--save_pruned_weights needs --save_dir DIR")
    if config.push_to_hub and not config.save_pruned_weights:
        raise UserError("--push_to_hub publishes the pruned model: add --save_pruned_weights")
    if config.hub_public and not config.push_to_hub:
        raise UserError("--hub_public applies to --push_to_hub: add --push_to_hub NAME, or leave it out")


def check_flags(config: PruningConfig) -> None:
    """Check the flags, each by itself and against the others.

    Raises:
        UserError: naming the flag to change.
    """
    calibration_texts(config)
    check_ranges(config)
    if config.whole_experts:
        check_whole_experts(config)
    check_budget(config)
    check_original_flags(config)
    check_output_flags(config)


def check_save_dir(config: PruningConfig) -> None:
    """Check that the output folder can be written and holds none of the inputs.

    Raises:
        UserError: if not, or if it has an interrupted run and neither ``--resume`` nor ``--overwrite`` is given.
    """
    folder = Path(config.save_dir)
    interrupted = LayerStore(folder).exists()
    if interrupted and not (config.resume or config.overwrite):
        raise UserError(f"--save_dir {folder}: a run was interrupted; --resume continues it, --overwrite starts anew")
    # A run interrupted before its evaluation has its output already.
    check_output(folder, config.overwrite or (config.resume and interrupted))
    texts = [] if config.skip_evaluate else eval_files(config.eval_datasets)
    inputs: dict[str, Iterable[str | Path | None]] = {"--profile": [config.profile]}
    inputs["MODEL"] = merged_models(config.model_path)
    inputs |= {"--latency_file": [config.latency_file]}
    inputs |= {"--data_file": [source.name for source in calibration_texts(config)], "--eval_datasets": texts}
    check_inputs_outside(folder, "--save_dir", inputs)


def check_multimodal(config: PruningConfig, model_config: PreTrainedConfig) -> None:
    """Check the flags of a multimodal model, and log which parts of it are pruned and saved.

    Args:
        config: flags.
        model_config: configuration of the model or, of a multimodal one, of its language model.

    Raises:
        UserError: naming the flag to change.
    """
    if not is_multimodal_checkpoint(config.model_path):
        if config.text_only:
            raise UserError("--text_only: the model is a language model already; leave it out")
        return
    text_of = getattr(model_config, TEXT_OF_KEY)
    if config.text_only:
        logger.info("--text_only: only the language model of the '%s' is used; its vision tower is left out", text_of)
        return
    if adapter_base(config.model_path) is not None:
        raise UserError(
            f"model {config.model_path}: an adapter of a multimodal '{text_of}'; merge it into its base first "
            "(merge_and_unload of peft), and give the merged model"
        )
    if config.stream:
        raise UserError(f"--stream: not with the vision tower of a '{text_of}'; leave --stream out, or add --text_only")
    logger.info(
        "the language model of the '%s' is pruned, calibrated on text; its vision tower is kept (--text_only leaves it "
        "out)",
        text_of,
    )


def with_devices(config: PruningConfig) -> PruningConfig:
    """Return ``config`` with the names of available devices; ``--cache_dev cuda`` is the GPU that layers run on.

    Raises:
        UserError: if a device is not available, or several processes are to share a GPU, which NCCL does not allow.
    """
    processes = local_processes()
    for flag, name in (("--device", config.device), ("--cache_dev", config.cache_dev or "")):
        if name.startswith("cuda:") and processes > 1:
            raise UserError(f"{flag} {name}: {processes} processes need a GPU each; {flag} cuda gives each its own")
    device = choose_local_device(config.device)
    cache_dev = choose_device(config.cache_dev, "--cache_dev") if config.cache_dev else device
    # Names of one GPU are to be equal, as runs with activations on the compute device are told by them.
    if cache_dev.type == device.type == "cuda" and cache_dev.index in (None, device.index or 0):
        cache_dev = device
    return replace(config, device=str(device), cache_dev=str(cache_dev))
