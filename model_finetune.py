"""Recover a pruned model on instruction data: LoRA, all weights, or with the pruned weights kept at zero.

    python model_finetune.py --model_name_or_path OUT/pruned_weights --data_path alpaca.json --use_lora true \
        --bf16 true --learning_rate 1e-4 --num_train_epochs 1 --max_length 256 --output_dir SFT 2>&1 | tee -i SFT.log
    torchrun --nproc_per_node=2 model_finetune.py --deepspeed configs/deepspeed.json …

With LoRA it writes SFT/ (the adapters) and SFT/lora_fused_model/ (a checkpoint in the format of its base); without,
SFT/ is the trained checkpoint. --is_mask_training true trains a zeroed model (OUT/) whose pruned weights stay exactly
zero, and adds pruning.json and pruned_weights/. --distill_from DENSE lets the dense model teach it. SFT/run.json holds
arguments, data, losses and perplexities.

Limits: every process holds the whole model and the whole teacher (ZeRO up to stage 2); one process measures the
perplexities.
"""

import copy
import gc
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import distributed
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from ppl_eval.ppl_dataset import DEFAULT_EVAL_SEQLENS, EvalSets, load_eval_sets
from ppl_eval.ppl_eval import evaluate
from slim_utils.cli import command_line, run_cli
from slim_utils.errors import noted
from slim_utils.families import Family, find_family, layer_shapes
from slim_utils.model_io import (
    RUN_FILE,
    SMALL_MODEL_FOLDER,
    atomic_entries,
    load_config,
    load_model,
    load_tokenizer,
    peak_memory_mib,
    save_checkpoint,
    write_json_atomic,
)
from slim_utils.output_folder import output_entries, output_lock
from slim_utils.params_remove import shrink
from slim_utils.pruning_record import PRUNING_FILE, LayerMask, read_masks, write_pruning
from slim_utils.run_record import environment
from slim_utils.side_by_side import side_by_side
from train_utils.distillation import DistillationTrainer, check_teacher, load_teacher
from train_utils.finetune_args import FinetuneArguments, extra_val_specs, parse_args
from train_utils.finetune_dataset import (
    FinetuneData,
    SampleSettings,
    default_cache_dir,
    load_finetune_data,
    window_dataset,
)
from train_utils.lora import cast_parameters, fuse_lora, prepare_model
from train_utils.sparse_trainer import MaskCallback, SlimTrainer, masked_slices

logger = logging.getLogger("model_finetune")

FUSED_FOLDER = "lora_fused_model"


@dataclass(frozen=True)
class PrunedModel:
    """What stays zero in a model that is trained with its masks."""

    family: Family
    masks: list[LayerMask]


def load_pruned(args: FinetuneArguments) -> PrunedModel | None:
    """The masks of ``--is_mask_training``; ``None`` without it."""
    if not args.sparse.is_mask_training:
        return None
    config = load_config(args.model.model_name_or_path, args.model.trust_remote_code)
    family = find_family(config)
    path = Path(args.sparse.mask_config_dir or args.model.model_name_or_path)
    return PrunedModel(family, read_masks(path, family, layer_shapes(config)))


def load_data(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, max_positions: int
) -> tuple[FinetuneData, EvalSets, EvalSets]:
    """Instruction data, the windows watched while training, and those measured before and after it."""
    data = args.data
    settings = SampleSettings(data.prompt_template_name, data.max_length, args.training.train_full_prompt)
    cache_dir = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
    # The first process reads and fills the cache; the others find it.
    with args.training.main_process_first(desc="data"):
        samples = load_finetune_data(
            data.train_data,
            data.data_path,
            tokenizer,
            settings,
            data.val_dataset_size,
            cache_dir if data.cache_dataset else None,
        )
        longest = [seqlen for seqlen in DEFAULT_EVAL_SEQLENS[1:] if seqlen <= max_positions]
        seqlens = data.eval_seqlens or [data.extra_val_seqlen, *longest]
        both = sorted({*seqlens, data.extra_val_seqlen})
        windows = load_eval_sets(extra_val_specs(data), tokenizer, both, max_positions)
    watched = {key: value for key, value in windows.items() if key[1] == data.extra_val_seqlen}
    return samples, watched, {key: value for key, value in windows.items() if key[1] in seqlens}


def build_trainer(
    args: FinetuneArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: FinetuneData,
    watched: EvalSets,
    teacher: PreTrainedModel | None,
) -> SlimTrainer:
    """The Trainer with its data, and with its teacher where there is one."""
    # For the batches alone; the saved tokenizer stays as it is.
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    padding.pad_token = padding.pad_token or padding.eos_token
    eval_sets = {"validation": data.validation} if data.validation is not None else {}
    eval_sets |= {name: window_dataset(windows) for (name, _), windows in watched.items()}
    options = {
        "model": model,
        "args": args.training,
        "data_collator": DataCollatorForSeq2Seq(padding, padding=True),
        "train_dataset": data.train,
        "eval_dataset": eval_sets if args.training.do_eval else None,
    }
    if teacher is None:
        return SlimTrainer(focal_gamma=args.model.focal_loss_gamma if args.model.use_focal_loss else None, **options)
    return DistillationTrainer(teacher=teacher, **options)


def save_result(
    args: FinetuneArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    pruned: PrunedModel | None,
    folder: Path,
) -> PreTrainedModel:
    """Write adapters and fused model, or the trained model, to ``folder``; returns what a user would load.

    Args:
        args: of the run.
        model: as trained.
        tokenizer: the base's.
        dtype: of the base checkpoint.
        pruned: its masks.
        folder: to write into.
    """
    if args.model.use_lora:
        model.save_pretrained(folder, save_embedding_layers=False)
        result = fuse_lora(args.model.model_name_or_path, str(folder), args.model.trust_remote_code)
        folder = folder / FUSED_FOLDER
    else:
        result = model.cpu()
        cast_parameters(result, dtype)
    save_checkpoint(result, tokenizer, folder)
    if pruned:
        write_pruning(folder / PRUNING_FILE, pruned.masks, result.config.model_type)
        if args.sparse.save_pruned_weights:
            save_checkpoint(shrink(result, pruned.family, pruned.masks), tokenizer, folder / SMALL_MODEL_FOLDER)
    return result


def start_record(args: FinetuneArguments, data: FinetuneData, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """The content of ``run.json`` before training."""
    return {
        "command": command_line(),
        "arguments": args.flat(),
        "seed": args.training.seed,
        "processes": args.training.world_size,
        **environment(args.training.device, "accelerate", "peft", *(["deepspeed"] if args.training.deepspeed else [])),
        "data": {
            "source": data.source,
            "train_samples": len(data.train),
            "validation_samples": len(data.validation or ()),
            "dropped_rows": data.num_dropped,
            "sha256": data.sha256,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "finished": False,
    }


def open_output(args: FinetuneArguments, record: dict[str, Any]) -> None:
    """Make the output folder, emptied of an earlier run's where that was asked for, and mark it as a run's."""
    output_dir = Path(args.training.output_dir)
    if args.training.overwrite and output_dir.exists() and not args.training.resume_from_checkpoint:
        for entry in output_entries(output_dir):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(output_dir / RUN_FILE, record)


def mask_record(mask: MaskCallback) -> dict[str, int]:
    """Size of the mask and what the optimizer did to it."""
    record = {
        "masked_weights": mask.size(),
        "nonzero_after_training": mask.nonzeros(),
        "moved_by_optimizer": int(mask.moved),
        "optimizer_steps": mask.steps,
    }
    logger.info("mask: %s", ", ".join(f"{name} {value}" for name, value in record.items()))
    return record


def report(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Print the perplexities before and after training side by side."""
    rows = [
        (f"perplexity {old['dataset']}, seqlen {old['seqlen']}", old["perplexity"], new["perplexity"])
        for old, new in zip(before, after, strict=True)
    ]
    if rows:
        print(side_by_side(rows, ("before", "after")))


def run(args: FinetuneArguments) -> None:
    """Load, measure, train, fuse, save, measure."""
    training = args.training
    is_main = training.process_index == 0
    if not is_main:
        logging.getLogger().setLevel(logging.ERROR)
    transformers.set_seed(training.seed)
    pruned = load_pruned(args)
    path, trusted = args.model.model_name_or_path, args.model.trust_remote_code
    tokenizer = load_tokenizer(path, trusted)
    config = load_config(path, trusted)
    if args.model.distill_from is not None:
        check_teacher(args, config, tokenizer)
    data, watched, measured = load_data(args, tokenizer, config.max_position_embeddings)
    model = load_model(path, "auto", trusted)
    teacher = load_teacher(args) if args.model.distill_from is not None else None
    dtype = model.dtype
    before = evaluate(model.to(training.device), measured) if is_main else []

    model = prepare_model(model, args)
    trainer = build_trainer(args, model, tokenizer, data, watched, teacher)
    if pruned:
        mask = MaskCallback(list(masked_slices(model, pruned.family, pruned.masks)))
        trainer.add_callback(mask)
    record = start_record(args, data, model)
    if is_main:
        open_output(args, record)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if not is_main:
        # Nothing is left to clean up, and threads that outlive the interpreter have been seen to abort the process,
        # which torchrun takes for the failure of all.
        logging.shutdown()
        os._exit(0)

    record |= {"finished": True, "training_seconds": round(seconds, 2), "log": trainer.state.log_history}
    if pruned:
        record["mask"] = mask_record(mask)
    with atomic_entries(Path(training.output_dir)) as folder:
        result = save_result(args, model, tokenizer, dtype, pruned, folder)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        write_json_atomic(folder / RUN_FILE, record)
    logger.info("saved %s", training.output_dir)
    del trainer, model, teacher
    gc.collect()
    with noted(f"{training.output_dir} is saved; only its perplexities are missing in {RUN_FILE}"):
        after = evaluate(result.to(training.device), measured)
        record |= {"perplexity": {"before": before, "after": after}}
        record |= {"peak_memory_mib": peak_memory_mib(training.device)}
        write_json_atomic(Path(training.output_dir) / RUN_FILE, record)
    report(before, after)


def main(args: FinetuneArguments) -> None:
    """Run as the only one that writes the output folder."""
    with output_lock(args.training.output_dir, "--output_dir"):
        run(args)


if __name__ == "__main__":
    run_cli(
        lambda: main(parse_args()),
        "model_finetune.py",
        memory_advice="lower --per_device_train_batch_size, or use --gradient_checkpointing true",
        output_flag="--output_dir",
    )
