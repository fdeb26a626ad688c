"""Prune a causal language model with SlimGPT: layer-wise OBS, no gradients, one device.

    python model_slimming.py MODEL c4 --num_samples 128 --percdamp 0 --non_uniform --min_sparsity 0.0625 \
        --max_sparsity 0.25 --save_pruned_weights --save_dir OUT 2>&1 | tee -i OUT.ppl

Outputs (written atomically): OUT/, the masked model (original shapes, removed weights zero; none where whole experts
are removed); OUT/pruned_weights/, the pruned model and its card; OUT/pruning.json, the kept and removed units of every
layer; OUT/run.json, arguments, versions, data, errors and seconds per layer, perplexities.

Limits: the families of the table; one layer and its Hessian fit on the device and, without --stream, the model in
memory.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_eval.ppl_dataset import EVAL_SPLITS, EvalSets, load_eval_sets, name_eval_sets
from ppl_eval.streamed_eval import evaluate_layers, evaluate_on
from slim_utils.allocation.planner import has_experts
from slim_utils.allocation.targets import target_record
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.cli.slimming_args import (
    add_budget_flags,
    add_calibration_flags,
    add_choice_flags,
    add_machine_flags,
    add_output_flags,
    add_ratio_flags,
    add_unit_flags,
)
from slim_utils.cli.slimming_checks import (
    calibration_texts,
    check_flags,
    check_multimodal,
    check_save_dir,
    num_sink_windows,
    resolve_preset,
    with_devices,
    with_preset,
)
from slim_utils.cli.slimming_latency import keep_table, latency_table, measured_latency, table_hash
from slim_utils.cli.slimming_stages import (
    ModelPlan,
    PrunedModel,
    open_host,
    plan_without_weights,
    prune,
    with_device_defaults,
)
from slim_utils.common.atomic_output import warn_if_short_of_space
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_length, check_token_ids, num_positions
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, load_config, load_tokenizer, peak_memory_mib
from slim_utils.common.model_source import check_input
from slim_utils.common.output_folder import output_lock
from slim_utils.families import find_family, layer_shapes
from slim_utils.family_like import add_family_like
from slim_utils.layerwise.distributed import ProcessGroup
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.resume import LayerStore, fingerprint
from slim_utils.masks import ModelUnits
from slim_utils.output.hub import publish, publishable_name
from slim_utils.output.provenance import public_name, read_model_units, read_provenance
from slim_utils.output.run_record import ModelSizes, pruning_record, rounding_settings
from slim_utils.output.writers import note_saved_output, write_output, write_record
from slim_utils.profiling.latency_table import LatencyTable
from slim_utils.profiling.model_stats import count_parameters, removed_share
from slim_utils.pruning_config import EXPERT_UNITS, Effect, PruningConfig
from slim_utils.slim_dataset import CalibrationData, load_calibration
from slim_utils.text_source import CALIBRATION_DATASETS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("model_slimming")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags of the original, with their names and defaults, and of the flags added since."""
    parser = ArgumentParser(prog="model_slimming.py", description="Prune a causal language model with SlimGPT.")
    parser.add_argument("model_path", help="checkpoint folder or hub name")
    parser.add_argument("dataset", nargs="?", choices=CALIBRATION_DATASETS, help="calibration data set from the hub")
    add_calibration_flags(parser.add_argument_group("calibration"))
    prune = parser.add_argument_group("pruning")
    add_ratio_flags(prune)
    add_budget_flags(prune)
    add_unit_flags(prune)
    add_choice_flags(prune)
    add_machine_flags(parser.add_argument_group("machine"))
    output = parser.add_argument_group("output")
    add_output_flags(output)
    output.add_argument("--skip_evaluate", action="store_true", help="skip the perplexity of the pruned model")
    output.add_argument("--eval_datasets", nargs="+", help=f"{', '.join(EVAL_SPLITS)}, FILE or NAME=FILE")
    output.add_argument("--eval_seqlens", nargs="+", type=int, help="window lengths (default: 128 2048)")
    parser.set_defaults(**asdict(PruningConfig()))
    return parser


def checked(config: PruningConfig) -> PruningConfig:
    """Return ``config`` with devices and hub name resolved; nothing is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    if config.expert_unit == EXPERT_UNITS[0]:
        # The default, of which an interrupted run may have no record.
        config = replace(config, expert_unit=None)
    check_flags(with_preset(config))
    if config.save_dir:
        check_save_dir(config)
    if config.push_to_hub:
        config = replace(config, push_to_hub=publishable_name(config.push_to_hub, config.overwrite))
    if not config.skip_evaluate:
        name_eval_sets(config.eval_datasets)
    return with_devices(config)


def evaluate_pruned(config: PruningConfig, host: ResidentModel, eval_sets: EvalSets) -> list[dict[str, Any]]:
    """Return the perplexities of the pruned model or, with ``--stream``, of the saved masked or pruned model."""
    if not config.stream:
        return evaluate_on(host, config.torch_device, eval_sets)
    host.close()
    folder = Path(config.save_dir) / PRUNED_MODEL_FOLDER if config.whole_experts else config.save_dir
    with closing(open_host(config, str(folder))) as saved:
        return evaluate_layers(saved, config.torch_device, eval_sets)


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run, checked against each other before the weights are loaded.

    Attributes:
        config: flags, with the preset resolved.
        plan: plan of every layer; ``None`` if it is measured on the weights.
        tokenizer: the model's tokenizer.
        data: calibration samples.
        eval_sets: windows for the perplexities.
        provenance: provenance of the model; ``{}`` for a run that saves nothing.
        units: units of the model, as indices into those of its dense base.
        table: latency table, for ``--target_latency``.
    """

    config: PruningConfig
    plan: ModelPlan | None
    tokenizer: PreTrainedTokenizerBase
    data: CalibrationData
    eval_sets: EvalSets
    provenance: dict[str, Any]
    units: ModelUnits
    table: LatencyTable | None


def prepare_inputs(config: PruningConfig) -> RunInputs:
    """Return the inputs of a run: plan, tokenizer, calibration samples and evaluation windows.

    Raises:
        UserError: if the inputs do not fit the model or each other, naming the flag to change.
    """
    model_config = load_config(config.model_path, config.trust_remote_code, language_model=True)
    check_multimodal(config, model_config)
    if config.family_like:
        add_family_like(model_config, config.family_like)
    find_family(model_config)
    check_input(config.model_path, config.stream)
    check_length(config.seqlen, model_config, "--seqlen")
    shapes = layer_shapes(model_config)
    if config.whole_experts and not has_experts(shapes):
        raise UserError("--expert_unit expert: the model has no experts; leave it out")
    config = resolve_preset(config)
    table = latency_table(config, model_config)
    plan = plan_without_weights(config, model_config, table)
    tokenizer = load_tokenizer(config.model_path, config.trust_remote_code)
    provenance = {}
    units = ModelUnits.unpruned(public_name(config.model_path), model_config.model_type, False, shapes)
    if config.save_dir:
        provenance = read_provenance(config.model_path, model_config, config.trust_remote_code)
        units = read_model_units(config.model_path, model_config, provenance)
    texts = calibration_texts(config)
    data = load_calibration(texts, tokenizer, config.num_samples, config.seqlen, config.seed, config.bos)
    config = replace(config, sink_windows=num_sink_windows(config, data.bos))
    specs = [] if config.skip_evaluate else config.eval_datasets
    eval_sets = load_eval_sets(specs, tokenizer, config.eval_seqlens, num_positions(model_config), config.bos)
    check_token_ids(model_config, tokenizer, data.samples, *eval_sets.values())
    return RunInputs(config, plan, tokenizer, data, eval_sets, provenance, units, table)


def open_store(inputs: RunInputs, host: ResidentModel, processes: ProcessGroup) -> LayerStore | None:
    """Open the store of finished layers, which ``--resume`` reads; ``None`` except in the main process."""
    processes.barrier()
    config, data, table = inputs.config, inputs.data, inputs.table
    store = LayerStore(Path(config.save_dir), config.keep_activations)
    settings = config.flags(Effect.VALUE)
    settings |= {"--profile": config.profile and hashlib.sha256(config.profile.read_bytes()).hexdigest()}
    settings |= {"--latency_file": table_hash(table)} if table else {}
    settings |= {"device": config.torch_device.type, "processes": processes.world_size}
    settings |= {"calibration": data.sha256, "model": fingerprint(host.model.config, host.sampled_tensors())}
    processes.on_main(lambda: store.open(settings, config.resume, rounding_settings(config)))
    if processes.rank:
        return None
    keep_table(store, table)
    return store


def save_and_evaluate(inputs: RunInputs, host: ResidentModel, pruned: PrunedModel) -> None:
    """Write the output folder if one is given, then measure the perplexities and complete its record."""
    config, save_dir, masks = inputs.config, Path(inputs.config.save_dir), pruned.masks
    sizes = ModelSizes(count_parameters(host.model), removed_share(host.layers, host.family, masks))
    logger.info("removed %.2f %% of the block weights in %.1f s", 100 * sizes.block_share_removed, pruned.seconds)
    record = pruning_record(
        config, inputs.data, inputs.provenance, sizes, pruned.reports, pruned.seconds, pruned.plan.sensitivities
    )
    if inputs.table and pruned.plan.latency:
        record.latency = {"of": config.latency_workload, **pruned.plan.latency, "table": inputs.table.to_json()}
    if config.save_dir:
        counted = config.target_size and not inputs.table
        count_target = partial(target_record, config, host.model.config) if counted else None
        write_output(save_dir, pruned.output, inputs.tokenizer, inputs.units, masks, record, count_target)
        logger.info("saved %s", config.save_dir)
    if inputs.eval_sets:
        with note_saved_output(config.save_dir):
            record.perplexity = evaluate_pruned(config, host, inputs.eval_sets)
            record.peak_memory_mib = peak_memory_mib(config.torch_device)
            if config.save_dir:
                write_record(save_dir, masks, record)
    if inputs.table and record.latency and config.save_pruned_weights:
        record.latency["measured"] = measured_latency(config, host, inputs.table)
        write_record(save_dir, masks, record)


def run(config: PruningConfig) -> None:
    """Prune a model.

    1. Load the model's configuration, the tokenizer and the texts; plan the sizes of the layers.
    2. Load the model; measure the plan on it if the allocation is measured; prune it layer by layer.
    3. In the main process, save it, measure its perplexities, and publish it.
    """
    inputs = prepare_inputs(config)
    config = inputs.config
    with closing(open_host(config, config.model_path)) as host:
        if config.save_dir:
            copies = 2 + config.save_pruned_weights - config.whole_experts
            warn_if_short_of_space(Path(config.save_dir), host.model, copies)
        logger.info(inputs.data.log_line())
        processes = ProcessGroup.init(config.torch_device)
        config = with_device_defaults(config, host, inputs.data.samples.numel() // processes.world_size)
        inputs = replace(inputs, config=config)
        store = open_store(inputs, host, processes) if config.save_dir else None
        pruned = prune(config, inputs.data, inputs.plan, host, store, processes, inputs.table)
        processes.destroy()
        if processes.rank:
            return
        save_and_evaluate(inputs, host, pruned)
    if config.push_to_hub:
        address = publish(Path(config.save_dir) / PRUNED_MODEL_FOLDER, config.push_to_hub, config.hub_public)
        logger.info("published %s", address)
    if store:
        store.discard()


def main(args: argparse.Namespace) -> None:
    """Check ``args`` and run, with a lock on the output folder."""
    config = PruningConfig(**vars(args))
    with output_lock(config.save_dir, "--save_dir"):
        run(checked(config))


if __name__ == "__main__":
    run_cli(
        lambda: main(build_parser().parse_args()),
        "model_slimming.py",
        memory_advice="use --cache_dev cpu, lower --batch_samples, or restart with --device cpu",
        output_flag="--save_dir",
        resume_advice="; --resume with the same --save_dir continues after the last finished layer",
    )
