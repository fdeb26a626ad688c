"""Checks of the flags of ``model_finetune.py`` before anything is loaded."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ppl_eval.ppl_dataset import name_eval_sets, split_eval_specs
from slim_utils.common.adapters import merged_models
from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import check_inputs_outside, eval_files
from slim_utils.common.loading import local_processes
from slim_utils.common.output_folder import output_lock
from slim_utils.text_mixture import parse_text_sources
from train_utils.optional_packages import check_packages
from train_utils.packed_text import FLAG
from train_utils.prompts import TEMPLATES
from train_utils.run_folder import choose_run_folder
from train_utils.sharding_checks import check_sharding
from train_utils.text_defaults import LORA, is_given

if TYPE_CHECKING:
    from train_utils.finetune_args import DataArguments, FinetuneArguments, TrainingArguments

logger = logging.getLogger(__name__)

LORA_BIASES = ("none", "all", "lora_only")
LORA_FLAGS = tuple(f"--peft_{name}" for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "target_modules"))
# Flags that the original parsed but ignored, and that have no equivalent here.
REFUSED_FLAGS = {
    "quantization_bit": "training quantised weights is not supported; leave it out and quantise afterwards",
    "auto_load": "use --resume_from_checkpoint true to continue from the last checkpoint",
    "extra_trainset": "put all rows into one file and pass it as --data_path",
    "is_sparse_training": "sparsity penalties are not supported; prune first, then use --is_mask_training true",
    "coef": "sparsity penalties are not supported; leave it out",
    "lr_multi": "sparsity penalties are not supported; leave it out",
}


def check_args(args: FinetuneArguments) -> None:
    """Check all groups of flags, the installed packages and the output folder.

    Raises:
        UserError: naming the flag to change.
    """
    for group in (args.model, args.data, args.training, args.sparse):
        for option in dataclasses.fields(group):
            if option.name in REFUSED_FLAGS and getattr(group, option.name) != option.default:
                raise UserError(f"--{option.name} {getattr(group, option.name)}: {REFUSED_FLAGS[option.name]}")
    check_gpu_count(args.training)
    check_model_args(args)
    check_data_args(args.data)
    check_training_args(args.training)
    if args.training.stop_on_held_out and args.data.val_dataset_size == 0:
        raise UserError("--stop_on_held_out true: nothing is held out; raise --val_dataset_size")
    if args.training.stop_on_held_out and args.training.load_best_model_at_end:
        raise UserError("--stop_on_held_out and --load_best_model_at_end exclude each other; leave one out")
    check_sharding(args)
    check_packages(args.training)
    # Takes the lock first, so that a live run is reported before the state of its unfinished output.
    with output_lock(args.training.output_dir, "--output_dir"):
        check_output_dir(args)


def use_one_gpu(training: TrainingArguments) -> None:
    """Train on one GPU, of all that are visible to a process without a launcher; logs it.

    The Trainer would give the others a replica and a part of every batch (torch's ``DataParallel``); a teacher's loss
    would then get the hidden states of one replica.
    """
    gpus = training.n_gpu
    if gpus > 1:
        logger.warning("training on one of %d GPUs; for all, start with torchrun --nproc_per_node=%d", gpus, gpus)
        training._n_gpu = 1


def check_gpu_count(training: TrainingArguments) -> None:
    """Check that every process that ``torchrun`` has started on this machine has a GPU of its own, as NCCL requires.

    Raises:
        UserError: if there are more processes than GPUs.
    """
    processes, gpus = local_processes(), torch.cuda.device_count()
    launched = "TORCHELASTIC_RUN_ID" in os.environ and "nccl" in (training.ddp_backend or "nccl")
    if launched and training.device.type == "cuda" and processes > gpus:
        raise UserError(f"{processes} processes for {gpus} GPUs: start with torchrun --nproc_per_node={gpus}")


def warn_without_effect(args: FinetuneArguments, argv: Sequence[str]) -> None:
    """Log a warning for flags in ``argv`` that have no effect beside the others."""
    model, data, training = args.model, args.data, args.training
    has_text = data.train_text is not None
    conditions: list[tuple[tuple[str, ...], bool, str]] = [
        (("--max_train_tokens", "--skip_train_tokens"), has_text, f"without {FLAG}"),
        (("--train_data", "--prompt_template_name", "--train_full_prompt"), not has_text, f"with {FLAG}"),
        (("--train_data",), has_text or data.data_path is None, "with --data_path"),
        (LORA_FLAGS, model.trained_part == LORA, f"without --train {LORA}"),
        (("--focal_loss_gamma",), model.use_focal_loss, "without --use_focal_loss true"),
        (("--cache_dir",), data.cache_dataset or model.cache_teacher > 0, "with --cache_dataset false"),
        (("--save_pruned_weights",), args.sparse.is_mask_training, "without --is_mask_training true"),
        (("--fsdp_config",), bool(training.fsdp), "without --fsdp true"),
        (("--eval_steps",), training.eval_strategy == IntervalStrategy.STEPS, "without --eval_strategy steps"),
        (("--save_steps",), training.save_strategy == SaveStrategy.STEPS, "without --save_strategy steps"),
        (
            ("--extra_val_seqlen", "--eval_seqlens"),
            bool(split_eval_specs(data.extra_val_set)),
            f"with --extra_val_set {data.extra_val_set}",
        ),
    ]
    for flags, has_effect, reason in conditions:
        given = [flag for flag in flags if is_given(flag, argv)]
        if given and not has_effect:
            logger.warning("%s no effect %s", f"{', '.join(given)} {'has' if len(given) == 1 else 'have'}", reason)


def check_model_args(args: FinetuneArguments) -> None:
    """Check the flags of the model, the adapters and the loss."""
    model = args.model
    if not model.model_name_or_path:
        raise UserError("give the model to train: --model_name_or_path DIR")
    if model.peft_lora_bias not in LORA_BIASES:
        raise UserError(f"--peft_lora_bias {model.peft_lora_bias}: choose one of {', '.join(LORA_BIASES)}")
    if model.use_lora and model.peft_lora_r < 1:
        raise UserError(f"--peft_lora_r {model.peft_lora_r}: at least 1")
    if model.use_lora and not 0 <= model.peft_lora_dropout < 1:
        raise UserError(f"--peft_lora_dropout {model.peft_lora_dropout:g}: at least 0 and below 1")
    if model.use_lora and model.train not in (None, LORA):
        raise UserError(f"--use_lora true and --train {model.train} exclude each other; leave one out")
    losses = {
        "--use_focal_loss": model.use_focal_loss,
        "--label_smoothing_factor": args.training.label_smoothing_factor,
        "--distill_from": model.distill_from is not None,
    }
    loss_flags = [flag for flag, value in losses.items() if value]
    if len(loss_flags) > 1:
        raise UserError(f"{' and '.join(loss_flags)} exclude each other; leave one out")
    if model.cache_teacher < 0:
        raise UserError(f"--cache_teacher {model.cache_teacher}: at least 0")
    if model.cache_teacher and model.distill_from is None:
        raise UserError(
            f"--cache_teacher {model.cache_teacher}: stores predictions of a teacher; add --distill_from DENSE"
        )
    if args.sparse.mask_config_dir and not args.sparse.is_mask_training:
        raise UserError("--mask_config_dir has no effect without --is_mask_training true")


def check_data_args(data: DataArguments) -> None:
    """Check the flags of the data."""
    if data.prompt_template_name not in TEMPLATES:
        raise UserError(f"--prompt_template_name {data.prompt_template_name}: choose one of {', '.join(TEMPLATES)}")
    for name, lowest in (("max_length", 2), ("val_dataset_size", 0), ("extra_val_seqlen", 2)):
        if getattr(data, name) < lowest:
            raise UserError(f"--{name} {getattr(data, name)}: at least {lowest}")
    if data.train_text is not None:
        if data.data_path is not None:
            raise UserError("--train_text and --data_path exclude each other; leave one out")
        if not data.max_train_tokens >= data.max_length:
            raise UserError(f"--max_train_tokens {data.max_train_tokens:g}: at least --max_length {data.max_length}")
        if data.max_train_tokens == math.inf:
            raise UserError("--max_train_tokens inf: not a number of tokens; the text may have fewer")
        if not 0 <= data.skip_train_tokens < math.inf:
            raise UserError(f"--skip_train_tokens {data.skip_train_tokens:g}: not a number of tokens; 0 skips none")
        parse_text_sources(FLAG, data.train_text)
    if any(seqlen < 2 for seqlen in data.eval_seqlens or ()):
        raise UserError("--eval_seqlens: at least 2")
    if "validation" in name_eval_sets(split_eval_specs(data.extra_val_set), "--extra_val_set"):
        raise UserError("--extra_val_set: validation is the name of the held-out rows; choose another: NAME=FILE")


def check_training_args(training: TrainingArguments) -> None:
    """Check flags of the Trainer whose values it does not check itself."""
    lowest = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
    for name, bound in (lowest | {"dataloader_num_workers": 0}).items():
        if getattr(training, name) < bound:
            raise UserError(f"--{name} {getattr(training, name)}: at least {bound}")
    if training.max_steps <= 0 and not 0 < training.num_train_epochs < math.inf:
        raise UserError(f"--num_train_epochs {training.num_train_epochs:g}: above 0")
    if not 0 <= training.seed < 1 << 32:
        raise UserError(f"--seed {training.seed}: between 0 and 2^32 - 1")
    if training.fp16 and training.device.type == "cpu":
        raise UserError("--fp16 true: needs a GPU; use --bf16 true, or leave it out")


def check_output_dir(args: FinetuneArguments) -> None:
    """Check ``--output_dir``, and set ``run_folder`` and the checkpoint to resume from.

    Raises:
        UserError: if the folder may not be written or holds an input of the run, or the checkpoint does not exist.
    """
    training = args.training
    args.run_folder, training.resume_from_checkpoint = choose_run_folder(
        Path(training.output_dir), training.overwrite, training.resume_from_checkpoint
    )
    deepspeed = training.deepspeed if isinstance(training.deepspeed, str) else None
    models = {"--model_name_or_path": args.model.model_name_or_path, "--distill_from": args.model.distill_from}
    inputs: dict[str, Sequence[str | None]] = {
        **{flag: merged_models(path) for flag, path in models.items() if path},
        "--data_path": [args.data.data_path],
        FLAG: [source.name for source in parse_text_sources(FLAG, args.data.train_text or ())],
        "--mask_config_dir": [args.sparse.mask_config_dir],
        "--extra_val_set": eval_files(split_eval_specs(args.data.extra_val_set)),
        "--deepspeed": [deepspeed],
    }
    check_inputs_outside(Path(training.output_dir), "--output_dir", inputs)
