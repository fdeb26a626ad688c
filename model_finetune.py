"""Recover a pruned model on plain text or instructions, with LoRA or in full, optionally keeping pruned weights zero.

    python model_finetune.py --model_name_or_path OUT/pruned_weights --data_path alpaca.json --use_lora true \
        --bf16 true --learning_rate 1e-4 --num_train_epochs 1 --max_length 256 --output_dir SFT 2>&1 | tee -i SFT.log
    torchrun --nproc_per_node=2 model_finetune.py --deepspeed configs/deepspeed.json …

With LoRA, writes SFT/ (the adapters) and SFT/lora_fused_model/ (a checkpoint in the format of its base); without, SFT/
is the trained checkpoint. --is_mask_training true trains the masked model (OUT/), keeps its pruned weights at exactly
zero, and adds pruning.json and pruned_weights/. --distill_from DENSE uses the dense model as teacher. SFT/run.json
holds arguments, data, losses and perplexities.

With ZeRO-3 or FSDP2 (--deepspeed configs/deepspeed_zero3.json, --fsdp true) the processes share the weights of model
and teacher; otherwise each of them holds both.

Limits: rank 0 alone measures perplexity.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import distributed

from ppl_eval.ppl_dataset import EvalKey
from slim_utils.cli.app import run_cli
from slim_utils.common.atomic_output import atomic_entries, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import annotate_errors
from slim_utils.common.input_checks import check_length, check_token_ids, num_positions
from slim_utils.common.loading import load_config, load_tokenizer, peak_memory_mib
from slim_utils.common.model_source import check_input
from slim_utils.common.output_folder import RUN_FILE, output_lock
from slim_utils.output.provenance import calibration_ngrams, read_model_units, read_provenance
from slim_utils.profiling.tables import side_by_side
from train_utils.finetune_args import FinetuneArguments, parse_args
from train_utils.prompts import NO_TEMPLATE, check_tokenizer
from train_utils.run_data import check_data, load_data
from train_utils.run_folder import install_result, open_run_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from train_utils.finetune_dataset import FinetuneData

logger = logging.getLogger("model_finetune")


def check_inputs(args: FinetuneArguments) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Check tokenizer, lengths, LoRA targets and teacher against the model's configuration, which is returned.

    With ``--check_only``, also that the texts can be read.

    Raises:
        UserError: naming the flag to change.
    """
    from train_utils.distillation import check_teacher
    from train_utils.lora import check_lora_targets
    from train_utils.sharding_checks import shards_weights

    path, trusted, data = args.model.model_name_or_path, args.model.trust_remote_code, args.data
    config = load_config(path, trusted)
    tokenizer = load_tokenizer(path, trusted)
    check_tokenizer(tokenizer, NO_TEMPLATE if data.train_text else data.prompt_template_name, path)
    check_input(path, shards_weights(args.training))
    check_length(data.max_length, config, "--max_length")
    check_lora_targets(args.model, config)
    if args.model.distill_from is not None:
        check_teacher(args, config, tokenizer)
    if args.training.check_only:
        check_data(args, tokenizer, num_positions(config))
    return config, tokenizer


def start_record(args: FinetuneArguments, data: FinetuneData, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """The content of ``run.json`` before training."""
    from train_utils.sharding import parameter_size

    return {
        "command": command_line(),
        "arguments": args.flat(),
        "seed": args.training.seed,
        "processes": args.training.world_size,
        **environment(args.training.device, "accelerate", "peft", *(["deepspeed"] if args.training.deepspeed else [])),
        "data": {
            "sources": data.sources,
            "train_samples": len(data.train),
            "validation_samples": len(data.validation or ()),
            "dropped_rows": data.num_dropped,
            "sha256": data.sha256,
        },
        "parameters": sum(map(parameter_size, model.parameters())),
        "trained_parameters": sum(map(parameter_size, filter(lambda item: item.requires_grad, model.parameters()))),
        "finished": False,
    }


def print_perplexities(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Print the perplexities before and after training side by side."""
    rows = [
        (
            f"perplexity {EvalKey(old['dataset'], old['seqlen'], old['bos']).label}",
            old["perplexity"],
            new["perplexity"],
        )
        for old, new in zip(before, after, strict=True)
    ]
    if rows:
        print(side_by_side(rows, ("before", "after")))


def run(args: FinetuneArguments) -> None:
    """Run one fine-tuning.

    1. Check the inputs; end here with ``--check_only``.
    2. Load the data, the model and the teacher; models whose weights are sharded are loaded after step 3.
    3. Measure perplexity (rank 0).
    4. Train.
    5. Save the adapters and the fused model, or the trained model (rank 0; sharded weights are gathered by all).
    6. Measure perplexity of the saved model and complete ``run.json`` and the model card (rank 0).
    """
    # Imported after the flags are checked: peft and the Trainer take seconds.
    from train_utils.finetune_result import (
        load_masks,
        mask_record,
        write_cards,
        write_unit_records,
    )
    from train_utils.learning_rate import set_text_learning_rate
    from train_utils.resumption import check_resumed, run_settings
    from train_utils.sharding import model_weights
    from train_utils.sparse_trainer import MaskCallback, masked_slices
    from train_utils.trainer_setup import (
        best_metric,
        build_trainer,
        evaluation_sets,
        held_out_record,
        padding_collator,
    )

    training = args.training
    is_main = training.process_index == 0
    if not is_main:
        logging.getLogger().setLevel(logging.ERROR)
    transformers.set_seed(training.seed)
    pruned = load_masks(args)
    # First: transformers then forgets ZeRO-3, under which it builds no model without weights for the checks.
    weights = model_weights(args, pruned)
    config, tokenizer = check_inputs(args)
    if training.check_only:
        logger.info("flags, models and texts are checked; nothing is trained (--check_only true)")
        return
    path = args.model.model_name_or_path
    provenance = read_provenance(path, config, args.model.trust_remote_code)
    units = read_model_units(path, config, provenance)
    data, training_windows, windows = load_data(args, tokenizer, num_positions(config), calibration_ngrams(provenance))
    splits = [split["input_ids"] for split in (data.train, data.validation) if split is not None]
    check_token_ids(config, tokenizer, *splits, *training_windows.values(), *windows.values())
    eval_sets = evaluation_sets(args, data, training_windows)
    training.metric_for_best_model = best_metric(training.metric_for_best_model, list(eval_sets))
    model: Any = weights.open_base()
    if args.model_sets_learning_rate:
        set_text_learning_rate(args, model)
    teacher: Any = weights.open_teacher() if args.model.distill_from is not None else None
    settings = run_settings(args, data, model, teacher, pruned.masks if pruned else None)
    if training.resume_from_checkpoint is not None:
        check_resumed(training.resume_from_checkpoint, settings)
    collator = padding_collator(tokenizer, config)
    before = weights.evaluate_base(model, windows) if is_main else []
    model = weights.load(model)
    if teacher is not None:
        teacher = weights.load_teacher(teacher, data, collator, settings)
        # With --cache_teacher, its weights are not needed any more; hooks refer to them.
        gc.collect()
    trainer = build_trainer(args, model, collator, data, eval_sets, teacher, settings)
    if pruned:
        mask = MaskCallback(list(masked_slices(model, pruned.family, pruned.masks)))
        trainer.add_callback(mask)
    record = start_record(args, data, model)
    if is_main:
        open_run_folder(args.run_folder, record, resumes=training.resume_from_checkpoint is not None)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    weights.gather(model, tokenizer)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if not is_main:
        # Exit without interpreter shutdown: lingering threads can abort the process there, and torchrun would then
        # report the whole run as failed.
        logging.shutdown()
        os._exit(0)

    record |= {"finished": True, "training_seconds": round(seconds, 2), "log": trainer.state.log_history}
    record |= held_out_record(trainer)
    with atomic_entries(args.run_folder) as folder:
        result = weights.write(model, tokenizer, folder)
        write_unit_records(args, folder, provenance, units, pruned)
        if pruned:
            record["mask"] = mask_record(mask, pruned, result)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        write_cards(args, folder, record, provenance, pruned, result)
        write_json_atomic(folder / RUN_FILE, record)
    output_dir = Path(training.output_dir)
    install_result(args.run_folder, output_dir)
    logger.info("saved %s", output_dir)
    del trainer, model, teacher
    gc.collect()
    with annotate_errors(f"{output_dir} is saved; only its perplexities are missing in {RUN_FILE}"):
        after = weights.evaluate_result(result, output_dir, windows)
        record |= {"perplexity": {"before": before, "after": after}}
        record |= {"peak_memory_mib": peak_memory_mib(training.device)}
        write_cards(args, output_dir, record, provenance, pruned, result)
        write_json_atomic(output_dir / RUN_FILE, record)
    print_perplexities(before, after)


def main(args: FinetuneArguments) -> None:
    """Run while holding the lock of the output folder."""
    with output_lock(args.training.output_dir, "--output_dir"):
        run(args)


if __name__ == "__main__":
    run_cli(
        lambda: main(parse_args()),
        "model_finetune.py",
        memory_advice="lower --per_device_train_batch_size, or use --gradient_checkpointing true or --train lora",
        output_flag="--output_dir",
    )
