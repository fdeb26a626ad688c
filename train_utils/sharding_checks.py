"""Flags of training with sharded weights (ZeRO-3, FSDP2), and what they exclude."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim_utils.common.errors import UserError
from train_utils.text_defaults import SCALES

if TYPE_CHECKING:
    from train_utils.finetune_args import FinetuneArguments, TrainingArguments

ZERO2_ADVICE = "use ZeRO-2 (--deepspeed configs/deepspeed.json)"


def zero_stage(training: TrainingArguments) -> int | None:
    """Stage of DeepSpeed's ZeRO; ``None`` without DeepSpeed."""
    return training.deepspeed_plugin.zero_stage if training.deepspeed_plugin is not None else None


def uses_zero3(training: TrainingArguments) -> bool:
    """Whether DeepSpeed shards the weights (ZeRO stage 3)."""
    return zero_stage(training) == 3


def uses_fsdp(training: TrainingArguments) -> bool:
    """Whether FSDP shards the weights."""
    return bool(training.fsdp)


def shards_weights(training: TrainingArguments) -> bool:
    """Whether the processes share the weights (ZeRO-3 or FSDP)."""
    return uses_zero3(training) or uses_fsdp(training)


def offloads_to_cpu(fsdp_config: dict[str, Any] | str | None) -> bool:
    """Whether ``--fsdp_config``, a file, json or its content, keeps the weights in host memory.

    Raises:
        ValueError: if it is not json.
        OSError: if the file cannot be read.
    """
    if isinstance(fsdp_config, str):
        text = fsdp_config if fsdp_config.startswith("{") else Path(fsdp_config).read_text(encoding="utf-8")
        fsdp_config = json.loads(text)
    config: Any = fsdp_config or {}
    return bool(config.get("cpu_offload") or config.get("fsdp_cpu_offload"))


def check_sharding(args: FinetuneArguments) -> None:
    """Refuse what does not work on sharded weights.

    Raises:
        UserError: naming the flag to change.
    """
    training = args.training
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("accelerate launch with FSDP: start with torchrun and --fsdp true instead")
    if uses_fsdp(training):
        _check_fsdp(training)
    if not shards_weights(training):
        return
    sharding = "--fsdp" if uses_fsdp(training) else "--deepspeed with ZeRO stage 3"
    refused = {
        "--is_mask_training true": args.sparse.is_mask_training,
        "--train scales": args.model.train == SCALES,
        "--fp16 true": training.fp16,
        "--load_best_model_at_end true": training.load_best_model_at_end,
        "--stop_on_held_out true": training.stop_on_held_out,
        f"--cache_teacher {args.model.cache_teacher}": args.model.cache_teacher,
        "--auto_find_batch_size true": training.auto_find_batch_size,
        f"--peft_lora_bias {args.model.peft_lora_bias}": args.model.use_lora and args.model.peft_lora_bias != "none",
    }
    for flag, is_given in refused.items():
        if is_given:
            raise UserError(f"{flag} does not work on sharded weights ({sharding}); leave it out, or {ZERO2_ADVICE}")


def _check_fsdp(training: TrainingArguments) -> None:
    """Refuse settings of FSDP that are not FSDP2's, or not applied to weights that are sharded when loaded."""
    if training.world_size == 1:
        raise UserError("--fsdp: needs several processes, torchrun --nproc_per_node=N model_finetune.py …")
    config = training.fsdp_config
    if int(config.get("version", 2)) != 2:
        raise UserError("--fsdp_config: version 1 is not supported; leave it out for FSDP2")
    if config.get("activation_checkpointing"):
        raise UserError("--fsdp_config: activation_checkpointing is not supported; use --gradient_checkpointing true")
