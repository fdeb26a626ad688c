"""Settings that a resumed run may not change, stored in every checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from slim_utils.common.errors import UserError
from slim_utils.layerwise.offload import OffloadedModel
from slim_utils.layerwise.resume import fingerprint, setting_changes
from slim_utils.masks import LayerMask
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import FinetuneData
from train_utils.sharding_checks import zero_stage
from train_utils.sparse_trainer import SETTINGS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_HASH_DIGITS = 16
_LORA_FLAGS = ("peft_lora_r", "peft_lora_alpha", "peft_lora_dropout", "peft_target_modules", "peft_lora_bias")
_DATA_FLAGS = ("prompt_template_name", "max_length", "val_dataset_size")
_TEXT_FLAGS = ("max_train_tokens", "skip_train_tokens")


def run_settings(
    args: FinetuneArguments,
    data: FinetuneData,
    model: PreTrainedModel | OffloadedModel,
    teacher: PreTrainedModel | OffloadedModel | None,
    masks: list[LayerMask] | None,
) -> dict[str, Any]:
    """Everything that the weights of a run depend on: fingerprints of model, teacher, masks and data, and flag values.

    Args:
        args: flags of the run.
        data: samples of the run.
        model: the model as loaded, before adapters or casts.
        teacher: model of ``--distill_from``.
        masks: masks of ``--is_mask_training``.
    """
    training = args.training
    settings = {"--train": args.model.trained_part} | {f"--{name}": getattr(args.model, name) for name in _LORA_FLAGS}
    if not args.model.use_lora:
        settings |= {f"--{name}": None for name in _LORA_FLAGS}
    stage = zero_stage(training)
    data_flags = _DATA_FLAGS + (_TEXT_FLAGS if args.data.train_text else ())
    settings |= {f"--{name}": getattr(args.data, name) for name in data_flags}
    settings |= {f"--{name}": getattr(training, name) for name in ("seed", "data_seed", "label_smoothing_factor")}
    return settings | {
        "--train_full_prompt": training.train_full_prompt,
        # Restored with the optimizer: another one would have no effect.
        "--learning_rate": training.learning_rate,
        "--optim": str(getattr(training.optim, "value", training.optim)),
        # Whose checkpoints differ in format.
        "--deepspeed": False if stage is None else f"ZeRO stage {stage}",
        # Among which DeepSpeed has split the state of its optimizer.
        "processes": None if stage is None else training.world_size,
        "--fsdp": True if training.fsdp else None,
        "--use_focal_loss": args.model.use_focal_loss and args.model.focal_loss_gamma,
        "model": _weights_fingerprint(model),
        "teacher": teacher and _weights_fingerprint(teacher),
        "--cache_teacher": args.model.cache_teacher or None,
        "masks": masks and masks_hash(masks),
        "data": data.sha256[:_HASH_DIGITS],
        "samples of a step": training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size,
    }


def masks_hash(masks: list[LayerMask]) -> str:
    """Hash of the kept units; unlike one of the objects, it stays the same when their class gets further fields."""
    units = [mask.kept_units() for mask in masks]
    return hashlib.sha256(json.dumps(units, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]


def _weights_fingerprint(model: PreTrainedModel | OffloadedModel) -> str:
    if isinstance(model, OffloadedModel):
        return fingerprint(model.model.config, model.sampled_tensors())[:_HASH_DIGITS]
    return fingerprint(model.config, model.named_parameters())[:_HASH_DIGITS]


def check_resumed(checkpoint: str, settings: dict[str, Any]) -> None:
    """Check that ``checkpoint`` was written with the same ``settings``.

    A setting that a checkpoint of another version does not have, or has alone, is not compared; a warning names it.

    Raises:
        UserError: listing the settings that differ, or naming a damaged file.
    """
    check_files(Path(checkpoint))
    path = Path(checkpoint) / SETTINGS_FILE
    if not path.is_file():
        logger.warning("--resume_from_checkpoint %s: no %s; settings are not compared", checkpoint, path.name)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if unknown := sorted(before.keys() ^ settings.keys()):
        logger.warning(
            "--resume_from_checkpoint %s: of another version of the suite; not compared: %s",
            checkpoint,
            ", ".join(unknown),
        )
    common = before.keys() & settings.keys()
    changes = setting_changes(*({name: side[name] for name in common} for side in (before, settings)))
    if changes:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: not the same run: {'; '.join(changes)}; leave it out to start over"
        )


def check_files(checkpoint: Path) -> None:
    """Check that the files of ``checkpoint`` are whole, which they are not after a full disk or a partial copy.

    Raises:
        UserError: naming the file that is not.
    """
    for path in sorted(checkpoint.rglob("*")):
        if not _is_whole(path):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: {path.name} is damaged; choose an earlier checkpoint, or "
                "leave the flag out to start over"
            )


def _is_whole(path: Path) -> bool:
    """Whether json can be parsed, and the index at the beginning or end of a file of weights fits its size."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return True
