"""Prune a causal language model with SlimGPT: layer-wise OBS, no gradients, one device.

    python model_slimming.py MODEL c4 --num_samples 128 --percdamp 0 --non_uniform --min_sparsity 0.0625 \
        --max_sparsity 0.25 --save_pruned_weights --save_dir OUT 2>&1 | tee -i OUT.ppl

Writes OUT/ (original shapes, removed weights zero), OUT/pruned_weights/ (the small model and its card),
OUT/pruning.json (what was kept and removed) and OUT/run.json (arguments, versions, data, errors and seconds per layer,
perplexities).

Limits: the families of the table; a layer and its Hessian fit on the device, the model, without --stream, in memory.
"""

import argparse
import hashlib
import logging
import os
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ppl_eval.ppl_dataset import EVAL_SPLITS, EvalSets, load_eval_sets, name_eval_sets
from ppl_eval.streamed_eval import evaluate_layers, evaluate_on
from slim_utils.allocation.planner import Measured, Planner, has_experts, no_file
from slim_utils.allocation.schedules import STRATEGIES
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.cli.slimming_args import add_budget_flags, add_calibration_flags, add_choice_flags
from slim_utils.cli.slimming_checks import (
    calibration_texts,
    check_budget,
    check_original_flags,
    check_output_flags,
    check_ranges,
    num_sink_windows,
    with_preset,
    with_preset_for_experts,
)
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_length, check_token_ids
from slim_utils.common.input_paths import check_inputs_outside, eval_files
from slim_utils.common.loading import (
    DTYPES,
    SMALL_MODEL_FOLDER,
    check_output,
    choose_device,
    load_config,
    load_model,
    load_tokenizer,
    model_on_meta,
    peak_memory_mib,
    scratch_folder,
    warn_if_short_of_space,
)
from slim_utils.common.output_folder import output_lock
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.distributed import ProcessGroup
from slim_utils.layerwise.offload import OffloadedModel, ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore, fingerprint
from slim_utils.layerwise.settings import GQA_UNITS
from slim_utils.masks import LayerMask
from slim_utils.output.hub import add_hub_flags, publish, publishable_name
from slim_utils.output.provenance import read_provenance
from slim_utils.output.run_record import measured_record, pruning_record, rounding_settings
from slim_utils.output.writers import StreamedOutput, WholeOutput, saved_before, write_output, write_record
from slim_utils.profiling.model_stats import count_parameters, removed_share
from slim_utils.pruning_config import Effect, PruningConfig
from slim_utils.slim_dataset import CalibrationData, load_calibration, sink_windows
from slim_utils.text_source import CALIBRATION_DATASETS

logger = logging.getLogger("model_slimming")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the original, under its name and with its default, and those added since."""
    parser = ArgumentParser(prog="model_slimming.py", description="Prune a causal language model with SlimGPT.")
    parser.add_argument("model_path", help="checkpoint folder or hub name")
    parser.add_argument("dataset", nargs="?", choices=CALIBRATION_DATASETS, help="calibration data set from the hub")
    add_calibration_flags(parser.add_argument_group("calibration"))
    prune = parser.add_argument_group("pruning")
    prune.add_argument("--sparsity", type=float, help="ratio of every layer (default %(default)s)")
    prune.add_argument("--non_uniform", action="store_true", help="a ratio per layer, from min to max")
    prune.add_argument("--non_uniform_strategy", choices=STRATEGIES)
    prune.add_argument("--min_sparsity", type=float, help="lowest ratio of a layer with --non_uniform")
    prune.add_argument("--max_sparsity", type=float, help="highest ratio of a layer with --non_uniform")
    add_budget_flags(prune)
    prune.add_argument("--gqa_unit", choices=GQA_UNITS, help="unit of heads where query heads share key/value heads")
    prune.add_argument("--multiple_of", type=int, help="every layer keeps a multiple of N FFN columns")
    prune.add_argument("--even_heads", action="store_true", help="every layer keeps an even number of heads")
    prune.add_argument("--tp_size", type=int, help="heads and columns divide by so many GPUs")
    prune.add_argument("--minlayer", type=int, help="first layer to prune")
    prune.add_argument("--maxlayer", type=int, help="layer to stop before")
    prune.add_argument("--no_compensate", action="store_true", help="only zero, leave the other weights as they are")
    prune.add_argument("--percdamp", type=float, help="damping of the Hessian (default %(default)s)")
    add_choice_flags(prune)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="auto, cuda, cuda:N or cpu (default %(default)s)")
    machine.add_argument("--cache_dev", help="cuda or cpu: where activations are kept (default: --device)")
    machine.add_argument("--batch_samples", type=int, help="samples brought to the device at once")
    machine.add_argument("--stream", action="store_true", help="for models larger than memory: one layer at a time")
    machine.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    machine.add_argument("--trust_remote_code", action="store_true", help="run model code found in the checkpoint")
    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", help="folder to write (default: nothing is saved)")
    output.add_argument("--save_pruned_weights", action="store_true", help="save the small model too")
    output.add_argument(
        "--uniform_shapes", action="store_true", help="the small model is a stock one, without code of its own"
    )
    output.add_argument("--overwrite", action="store_true", help="replace an earlier run's --save_dir")
    output.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same --save_dir")
    add_hub_flags(output)
    output.add_argument("--skip_evaluate", action="store_true", help="no perplexity afterwards")
    output.add_argument("--eval_datasets", nargs="+", help=f"{', '.join(EVAL_SPLITS)}, FILE or NAME=FILE")
    output.add_argument("--eval_seqlens", nargs="+", type=int, help="window lengths (default: 128 2048)")
    parser.set_defaults(**asdict(PruningConfig()))
    return parser


def checked(config: PruningConfig) -> PruningConfig:
    """``config`` with its preset, devices and hub name resolved; checked before anything is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    calibration_texts(config)
    check_ranges(config)
    config = with_preset(config)
    check_budget(config)
    check_original_flags(config)
    check_output_flags(config)
    if config.save_dir:
        check_save_dir(config)
    if config.push_to_hub:
        config = replace(config, push_to_hub=publishable_name(config.push_to_hub, config.overwrite))
    if not config.skip_evaluate:
        name_eval_sets(config.eval_datasets)
    return with_devices(config)


def check_save_dir(config: PruningConfig) -> None:
    """Make sure that the output folder can be written and holds none of the inputs.

    Raises:
        UserError: if not, or if a run on it was cut off and it is not said what becomes of that.
    """
    folder = Path(config.save_dir)
    cut_off = LayerStore(folder).exists()
    if cut_off and not (config.resume or config.overwrite):
        raise UserError(f"--save_dir {folder}: a run was cut off; --resume goes on, --overwrite starts anew")
    # It may have been cut off when its output was there already, and not evaluated yet.
    check_output(folder, config.overwrite or (config.resume and cut_off))
    texts = [] if config.skip_evaluate else eval_files(config.eval_datasets)
    inputs: dict[str, Iterable[str | Path | None]] = {"MODEL": [config.model_path], "--profile": [config.profile]}
    inputs |= {"--data_file": config.data_file or [], "--eval_datasets": texts}
    check_inputs_outside(folder, "--save_dir", inputs)


def with_devices(config: PruningConfig) -> PruningConfig:
    """``config`` with the names of devices that are there.

    Raises:
        UserError: if there is no such device.
    """
    name = config.device
    if name == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(name)
    cache_dev = choose_device(config.cache_dev, "--cache_dev") if config.cache_dev else device
    return replace(config, device=str(device), cache_dev=str(cache_dev))


def open_host(config: PruningConfig, model_path: str) -> ResidentModel:
    """The model of ``model_path``: whole in memory or, streamed, layer by layer."""
    if config.stream:
        return OffloadedModel(model_path, config.dtype, config.trust_remote_code, scratch_folder(Path(config.save_dir)))
    model = load_model(model_path, config.dtype, config.trust_remote_code)
    return ResidentModel(model, find_family(model.config))


def open_store(
    config: PruningConfig, host: ResidentModel, data: CalibrationData, processes: ProcessGroup
) -> LayerStore | None:
    """Where the first process keeps finished layers until all are."""
    processes.barrier()
    store = LayerStore(Path(config.save_dir))
    settings = config.flags(Effect.VALUE)
    settings |= {"--profile": config.profile and hashlib.sha256(config.profile.read_bytes()).hexdigest()}
    settings |= {"device": config.torch_device.type, "processes": processes.world_size}
    settings |= {"calibration": data.sha256, "model": fingerprint(host.model.config, host.sampled_tensors())}
    processes.on_main(lambda: store.open(settings, config.resume, rounding_settings(config)))
    return None if processes.rank else store


def open_output(
    config: PruningConfig, host: ResidentModel, store: LayerStore | None, planned: list[LayerMask]
) -> WholeOutput | StreamedOutput:
    """What writes the checkpoints: all at the end or, streamed, in the first process, as layers are settled."""
    if isinstance(host, OffloadedModel) and store:
        return StreamedOutput(store.output, host, planned, config.save_pruned_weights, config.uniform_shapes)
    return WholeOutput(host.model, host.family, config.save_pruned_weights, config.uniform_shapes)


def evaluate_pruned(config: PruningConfig, host: ResidentModel, eval_sets: EvalSets) -> list[dict[str, Any]]:
    """Perplexities of the pruned model; where it was streamed, of what was saved."""
    if not config.stream:
        return evaluate_on(host, config.torch_device, eval_sets)
    host.close()
    with closing(open_host(config, config.save_dir)) as saved:
        return evaluate_layers(saved, config.torch_device, eval_sets)


def run(config: PruningConfig, allocation: str | None) -> None:
    """Load, prune, save, evaluate; ``allocation`` is the one that was given, before any preset."""
    model_config = load_config(config.model_path, config.trust_remote_code)
    family = find_family(model_config)
    check_length(config.seqlen, model_config, "--seqlen")
    skeleton = ResidentModel(model_on_meta(model_config, trust_remote_code=config.trust_remote_code), family)
    if has_experts(layer_shapes(model_config)):
        config = with_preset_for_experts(config, allocation)
    planner = Planner(config, skeleton)
    if config.measures:
        planner.check_measurable()
    else:
        plans = planner.plans()
        planned = planner.size_masks(plans)
    tokenizer = load_tokenizer(config.model_path, config.trust_remote_code)
    provenance = {}
    if config.save_dir:
        provenance = read_provenance(config.model_path, model_config, config.trust_remote_code)
    texts = calibration_texts(config)
    data = load_calibration(texts, tokenizer, config.num_samples, config.seqlen, config.seed, config.bos)
    num_windows = num_sink_windows(config, data.bos)
    config = replace(config, sink_windows=num_windows)
    specs = [] if config.skip_evaluate else config.eval_datasets
    positions = model_config.max_position_embeddings
    eval_sets = load_eval_sets(specs, tokenizer, config.eval_seqlens, positions, config.bos)
    check_token_ids(model_config, tokenizer, data.samples, *eval_sets.values())
    with closing(open_host(config, config.model_path)) as host:
        if config.save_dir:
            warn_if_short_of_space(Path(config.save_dir), host.model, copies=2 + config.save_pruned_weights)
        logger.info(data.log_line())
        processes = ProcessGroup.init(config.torch_device)
        start, measured = time.perf_counter(), Measured()
        store = open_store(config, host, data, processes) if config.save_dir else None
        samples, starts = processes.shard(data.samples), None
        if num_windows:
            starts = processes.shard(sink_windows(data.samples[:, data.bos :], num_windows), "--sink_windows")
        if config.measures:
            planner = Planner(config, host)
            plans, measured = planner.measured(samples, starts, store.measured if store else no_file)
            planned = planner.size_masks(plans)
        output = open_output(config, host, store, planned)
        masks, reports = prune_layers(
            host.model, family, samples, plans, planner.settings, store, processes, host, starts
        )
        seconds = time.perf_counter() - start + (store.seconds_before if store else 0)
        processes.destroy()
        if processes.rank:
            return
        sizes = {
            "parameters_dense": count_parameters(host.model),
            "block_share_removed": removed_share(host.layers, family, masks),
        }
        logger.info("removed %.2f %% of the block weights in %.1f s", 100 * sizes["block_share_removed"], seconds)
        record = pruning_record(config, data, provenance, reports, sizes, seconds) | measured_record(measured)
        if config.save_dir:
            write_output(Path(config.save_dir), output, tokenizer, masks, record)
            logger.info("saved %s", config.save_dir)
        if eval_sets:
            with saved_before(config.save_dir):
                record["perplexity"] = evaluate_pruned(config, host, eval_sets)
                record["peak_memory_mib"] = peak_memory_mib(config.torch_device)
                if config.save_dir:
                    write_record(Path(config.save_dir), masks, record)
    if config.push_to_hub:
        address = publish(Path(config.save_dir) / SMALL_MODEL_FOLDER, config.push_to_hub, config.hub_public)
        logger.info("published %s", address)
    if store:
        store.discard()


def main(args: argparse.Namespace) -> None:
    """Check ``args`` and run, as the only one that writes the output folder."""
    config = PruningConfig(**vars(args))
    with output_lock(config.save_dir, "--save_dir"):
        run(checked(config), config.allocation)


if __name__ == "__main__":
    run_cli(
        lambda: main(build_parser().parse_args()),
        "model_slimming.py",
        memory_advice="use --cache_dev cpu, lower --batch_samples, or start anew with --device cpu",
        output_flag="--save_dir",
        resume_advice="; --resume with the same --save_dir goes on after the last finished layer",
    )
