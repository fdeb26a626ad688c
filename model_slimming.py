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
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ppl_eval.ppl_dataset import EVAL_SPLITS, EvalSets, load_eval_sets, name_eval_sets
from ppl_eval.streamed_eval import evaluate_layers, evaluate_on
from slim_utils.allocation.schedules import STRATEGIES
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.cli.slimming_args import (
    RESUMED_ARGUMENTS,
    add_budget_flags,
    add_calibration_flags,
    add_choice_flags,
    apply_preset,
    calibration_texts,
    check_budget,
    check_search,
    measures,
    plan,
    replace_preset_search,
    search,
    settle_text_starts,
    walk_settings,
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
from slim_utils.families import find_family
from slim_utils.layerwise.distributed import World
from slim_utils.layerwise.offload import LayerHost, StreamedHost
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore, fingerprint
from slim_utils.layerwise.settings import GQA_UNITS
from slim_utils.masks import LayerMask
from slim_utils.output.hub import add_hub_flags, check_hub_flags, check_publishable, publish
from slim_utils.output.provenance import read_provenance
from slim_utils.output.run_record import pruning_record, rounding_settings, search_record
from slim_utils.output.writers import StreamedOutput, WholeOutput, saved_before, write_output, write_record
from slim_utils.profiling.model_stats import count_parameters, removed_share
from slim_utils.slim_dataset import CalibrationData, load_calibration, text_starts
from slim_utils.text_source import CALIBRATION_DATASETS

logger = logging.getLogger("model_slimming")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the original, under its name and with its default, and those added since."""
    parser = ArgumentParser(prog="model_slimming.py", description="Prune a causal language model with SlimGPT.")
    parser.add_argument("model_path", help="checkpoint folder or hub name")
    parser.add_argument("dataset", nargs="?", choices=CALIBRATION_DATASETS, help="calibration data set from the hub")
    add_calibration_flags(parser.add_argument_group("calibration"))
    prune = parser.add_argument_group("pruning")
    prune.add_argument("--sparsity", type=float, default=0, help="ratio of every layer (default %(default)s)")
    prune.add_argument("--non_uniform", action="store_true", help="a ratio per layer, from min to max")
    prune.add_argument("--non_uniform_strategy", choices=STRATEGIES, default="log_increase")
    prune.add_argument("--min_sparsity", type=float, default=0, help="lowest ratio of a layer with --non_uniform")
    prune.add_argument("--max_sparsity", type=float, default=0, help="highest ratio of a layer with --non_uniform")
    add_budget_flags(prune)
    prune.add_argument(
        "--gqa_unit", choices=GQA_UNITS, default=GQA_UNITS[0], help="what goes where query heads share key/value heads"
    )
    prune.add_argument("--multiple_of", type=int, default=1, help="every layer keeps a multiple of N FFN columns")
    prune.add_argument("--even_heads", action="store_true", help="every layer keeps an even number of heads")
    prune.add_argument("--tp_size", type=int, default=1, help="heads and columns divide by so many GPUs")
    prune.add_argument("--minlayer", type=int, default=-1, help="first layer to prune")
    prune.add_argument("--maxlayer", type=int, default=1000, help="layer to stop before")
    prune.add_argument("--no_compensate", action="store_true", help="only zero, leave the other weights as they are")
    prune.add_argument("--percdamp", type=float, default=0.01, help="damping of the Hessian (default %(default)s)")
    add_choice_flags(prune)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default %(default)s)")
    machine.add_argument("--cache_dev", help="cuda or cpu: where activations are kept (default: --device)")
    machine.add_argument("--batch_samples", type=int, default=128, help="samples brought to the device at once")
    machine.add_argument("--stream", action="store_true", help="for models larger than memory: one layer at a time")
    machine.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    machine.add_argument("--trust_remote_code", action="store_true", help="run model code found in the checkpoint")
    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", default="", help="folder to write (default: nothing is saved)")
    output.add_argument("--save_pruned_weights", action="store_true", help="save the small model too")
    output.add_argument(
        "--uniform_shapes", action="store_true", help="the small model is a stock one, without code of its own"
    )
    output.add_argument("--overwrite", action="store_true", help="replace an earlier run's --save_dir")
    output.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same --save_dir")
    add_hub_flags(output)
    output.add_argument("--skip_evaluate", action="store_true", help="no perplexity afterwards")
    output.add_argument(
        "--eval_datasets", nargs="+", default=["wikitext2"], help=f"{', '.join(EVAL_SPLITS)}, FILE or NAME=FILE"
    )
    output.add_argument("--eval_seqlens", nargs="+", type=int, help="window lengths (default: 128 2048)")
    return parser


def process_args(args: argparse.Namespace) -> argparse.Namespace:
    """Check ``args`` before anything is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    calibration_texts(args)
    for name, lowest in (("num_samples", 1), ("seqlen", 2), ("batch_samples", 1), ("multiple_of", 1), ("tp_size", 1)):
        if getattr(args, name) < lowest:
            raise UserError(f"--{name} {getattr(args, name)}: at least {lowest}")
    for name in ("sparsity", "min_sparsity", "max_sparsity"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 0 and less than 1")
    for name in ("percdamp", "column_group", "text_starts"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: at least 0")
    apply_preset(args)
    check_budget(args)
    if args.min_sparsity > args.max_sparsity and not args.allocation:
        raise UserError(f"--min_sparsity {args.min_sparsity} is above --max_sparsity {args.max_sparsity}")
    if args.non_uniform and args.sparsity:
        logger.warning("--sparsity %g has no effect with --non_uniform", args.sparsity)
    if not args.non_uniform and args.max_sparsity:
        logger.warning("--min_sparsity and --max_sparsity have no effect without --non_uniform")
    if args.uniform_shapes and args.non_uniform:
        raise UserError("--uniform_shapes wants one ratio for all layers: --sparsity instead of --non_uniform")
    if args.uniform_shapes and not args.save_pruned_weights:
        raise UserError("--uniform_shapes is about the small model: add --save_pruned_weights")
    if args.resume and not args.save_dir:
        raise UserError("--resume needs the --save_dir of the run to go on with")
    if args.stream and not args.save_dir:
        raise UserError("--stream writes layer by layer as it goes: give --save_dir DIR")
    if args.save_pruned_weights and not args.save_dir:
        raise UserError("--save_pruned_weights needs --save_dir DIR")
    check_hub_flags(args)
    if args.save_dir:
        cut_off = LayerStore(Path(args.save_dir)).exists()
        if cut_off and not (args.resume or args.overwrite):
            raise UserError(f"--save_dir {args.save_dir}: a run was cut off; --resume goes on, --overwrite starts anew")
        # It may have been cut off when its output was there already, and not evaluated yet.
        check_output(Path(args.save_dir), args.overwrite or (args.resume and cut_off))
        texts = [] if args.skip_evaluate else eval_files(args.eval_datasets)
        inputs = {"MODEL": [args.model_path], "--data_file": args.data_file or [], "--profile": [args.profile]}
        check_inputs_outside(Path(args.save_dir), "--save_dir", inputs | {"--eval_datasets": texts})
    if args.push_to_hub:
        args.push_to_hub = check_publishable(args.push_to_hub, args.overwrite)
    if args.device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    args.device = choose_device(args.device)
    args.cache_dev = choose_device(args.cache_dev, "--cache_dev") if args.cache_dev else args.device
    if any(seqlen < 2 for seqlen in args.eval_seqlens or ()):
        raise UserError("--eval_seqlens: at least 2")
    if not args.skip_evaluate:
        name_eval_sets(args.eval_datasets)
    return args


def open_host(args: argparse.Namespace, model_path: str) -> LayerHost:
    """The model of ``model_path``: whole in memory or, streamed, layer by layer."""
    if args.stream:
        return StreamedHost(model_path, args.dtype, args.trust_remote_code, scratch_folder(Path(args.save_dir)))
    model = load_model(model_path, args.dtype, args.trust_remote_code)
    return LayerHost(model, find_family(model.config))


def open_store(args: argparse.Namespace, host: LayerHost, data: CalibrationData, world: World) -> LayerStore | None:
    """Where the first process keeps finished layers until all are."""
    world.wait()
    store = LayerStore(Path(args.save_dir))
    settings = {f"--{name}": getattr(args, name) for name in RESUMED_ARGUMENTS}
    settings |= {"--profile": args.profile and hashlib.sha256(args.profile.read_bytes()).hexdigest()}
    settings |= {"device": args.device.type, "processes": world.size}
    settings |= {"calibration": data.sha256, "model": fingerprint(host.model.config, host.sampled_tensors())}
    world.once(lambda: store.open(settings, args.resume, rounding_settings(args)))
    return None if world.rank else store


def open_output(
    args: argparse.Namespace, host: LayerHost, store: LayerStore | None, planned: list[LayerMask]
) -> WholeOutput | StreamedOutput:
    """What writes the checkpoints: all at the end or, streamed, in the first process, as layers are settled."""
    if args.stream and store:
        return StreamedOutput(store.output, host, planned, args.save_pruned_weights, args.uniform_shapes)
    return WholeOutput(host.model, host.family, args.save_pruned_weights, args.uniform_shapes)


def evaluate_pruned(args: argparse.Namespace, host: LayerHost, eval_sets: EvalSets) -> list[dict[str, Any]]:
    """Perplexities of the pruned model; where it was streamed, of what was saved."""
    if not args.stream:
        return evaluate_on(host, args.device, eval_sets)
    host.close()
    with closing(open_host(args, args.save_dir)) as saved:
        return evaluate_layers(saved, args.device, eval_sets)


def run(args: argparse.Namespace, asked: str | None) -> None:
    """Load, prune, save, evaluate; ``asked`` is the ``--allocation`` that was given, before any preset."""
    config = load_config(args.model_path, args.trust_remote_code)
    family = find_family(config)
    positions = config.max_position_embeddings
    check_length(args.seqlen, config, "--seqlen")
    settings = walk_settings(args)
    skeleton = LayerHost(model_on_meta(config, trust_remote_code=args.trust_remote_code), family)
    replace_preset_search(args, asked, config)
    if measures(args):
        check_search(args, skeleton, settings)
    else:
        ratios, planned = plan(args, skeleton, settings)
    tokenizer = load_tokenizer(args.model_path, args.trust_remote_code)
    provenance = read_provenance(args.model_path, config, args.trust_remote_code) if args.save_dir else {}
    data = load_calibration(calibration_texts(args), tokenizer, args.num_samples, args.seqlen, args.seed, args.bos)
    settle_text_starts(args, data.bos)
    specs = [] if args.skip_evaluate else args.eval_datasets
    eval_sets = load_eval_sets(specs, tokenizer, args.eval_seqlens, positions, args.bos)
    check_token_ids(config, tokenizer, data.samples, *eval_sets.values())
    with closing(open_host(args, args.model_path)) as host:
        if args.save_dir:
            warn_if_short_of_space(Path(args.save_dir), host.model, copies=2 + args.save_pruned_weights)
        logger.info(data.log_line())
        world = World.join(args.device)
        start = time.perf_counter()
        store = open_store(args, host, data, world) if args.save_dir else None
        starts, measured = text_starts(data.samples[:, data.bos :], args.text_starts), {}
        samples, starts = world.share(data.samples), world.share(starts, "--text_starts") if len(starts) else None
        if measures(args):
            ratios, measured = search(args, host, samples, starts, settings, store)
            ratios, planned = plan(args, host, settings, ratios)
        output = open_output(args, host, store, planned)
        masks, reports = prune_layers(host.model, family, samples, ratios, settings, store, world, host, starts)
        seconds = time.perf_counter() - start + (store.seconds_before if store else 0)
        world.leave()
        if world.rank:
            return
        sizes = {
            "parameters_dense": count_parameters(host.model),
            "block_share_removed": removed_share(host.layers, family, masks),
        }
        logger.info("removed %.2f %% of the block weights in %.1f s", 100 * sizes["block_share_removed"], seconds)
        record = pruning_record(args, data, provenance, reports, sizes, seconds)
        record |= {kind: search_record(of) for kind, of in measured.items()}
        if args.save_dir:
            write_output(Path(args.save_dir), output, tokenizer, masks, record)
            logger.info("saved %s", args.save_dir)
        if eval_sets:
            with saved_before(args.save_dir):
                record["perplexity"] = evaluate_pruned(args, host, eval_sets)
                record["peak_memory_mib"] = peak_memory_mib(args.device)
                if args.save_dir:
                    write_record(Path(args.save_dir), masks, record)
    if args.push_to_hub:
        address = publish(Path(args.save_dir) / SMALL_MODEL_FOLDER, args.push_to_hub, args.hub_public)
        logger.info("published %s", address)
    if store:
        store.discard()


def main(args: argparse.Namespace) -> None:
    """Check ``args`` and run, as the only one that writes the output folder."""
    asked = args.allocation
    with output_lock(args.save_dir, "--save_dir"):
        run(process_args(args), asked)


if __name__ == "__main__":
    run_cli(
        lambda: main(build_parser().parse_args()),
        "model_slimming.py",
        memory_advice="use --cache_dev cpu, lower --batch_samples, or start anew with --device cpu",
        output_flag="--save_dir",
        resume_advice="; --resume with the same --save_dir goes on after the last finished layer",
    )
