"""Outputs of a fine-tuning run: adapters and fused model, or the trained model, with masks applied."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel

from slim_utils.common.adapters import FUSED_FOLDER
from slim_utils.common.errors import UserError
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, load_config, load_model, save_checkpoint
from slim_utils.families import Family, find_family, layer_shapes
from slim_utils.masks import PRUNING_FILE, LayerMask, ModelUnits, read_masks, read_pruning, write_pruning, write_units
from slim_utils.output.model_card import version_list, write_card
from slim_utils.output.provenance import (
    pruning_step,
    pruning_steps,
    public_name,
    recovery_step,
    remaining_weights,
    with_step,
)
from slim_utils.params_remove import shrink, zero_removed
from slim_utils.text_source import hub_datasets
from train_utils.finetune_args import FinetuneArguments
from train_utils.lora import fuse_lora, lora_targets
from train_utils.sparse_trainer import MaskCallback, masked_slices
from train_utils.text_defaults import BLOCK_WEIGHTS, SCALES, TRAINED_PARTS
from train_utils.trainable import cast_parameters, fuse_scales, with_trained_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelMasks:
    """The masks of a model that is trained with its pruned weights at zero."""

    family: Family
    masks: list[LayerMask]

    def count(self, model: PreTrainedModel) -> tuple[int, int]:
        """Number of nonzero removed weights of ``model``, and of all removed weights."""
        slices = list(masked_slices(model, self.family, self.masks))
        return int(sum(masked.nonzeros() for masked in slices)), sum(masked.size() for masked in slices)


def load_masks(args: FinetuneArguments) -> ModelMasks | None:
    """The masks of ``--is_mask_training``; ``None`` without it, with a warning for a masked model."""
    model = args.model.model_name_or_path
    if not args.sparse.is_mask_training:
        if is_masked(Path(model), args.model.trust_remote_code):
            logger.warning(
                "%s is a masked model, and its pruned weights are trained too; use %s, or --is_mask_training true",
                model,
                Path(model) / PRUNED_MODEL_FOLDER,
            )
        return None
    config = load_config(model, args.model.trust_remote_code)
    family = find_family(config)
    path = Path(args.sparse.mask_config_dir or model)
    return ModelMasks(family, read_masks(path, family, layer_shapes(config)))


def is_masked(folder: Path, trust_remote_code: bool) -> bool:
    """Whether the checkpoint in ``folder`` has the shapes before the removal that its ``pruning.json`` describes."""
    if not (folder / PRUNING_FILE).is_file():
        return False
    try:
        masks = read_pruning(folder / PRUNING_FILE)
    except UserError:
        # Only needed with --is_mask_training; the file is of another version.
        return False
    shapes = layer_shapes(load_config(str(folder), trust_remote_code))
    return any(mask.plan for mask in masks) and [mask.shape for mask in masks] == shapes


def warn_if_not_masked(model: PreTrainedModel, pruned: ModelMasks, path: str) -> None:
    """Warn if the base model ``path`` has nonzero weights that the masks remove."""
    nonzeros, total = pruned.count(model)
    if nonzeros:
        logger.warning(
            "%d of %d weights that the masks remove are not zero in %s; they are zero during training and in the saved "
            "model, but the adapters alone, applied to %s, do not remove them",
            nonzeros,
            total,
            path,
            path,
        )


def save_result(
    args: FinetuneArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    pruned: ModelMasks | None,
    folder: Path,
) -> PreTrainedModel:
    """Write adapters and fused model, or the trained model, to ``folder``; return the model that a user would load.

    Args:
        args: flags of the run.
        model: the trained model.
        tokenizer: tokenizer of the base.
        dtype: dtype of the base checkpoint.
        pruned: masks of the model, if it is trained with masks.
        folder: output folder.
    """
    base, trusted = args.model.model_name_or_path, args.model.trust_remote_code
    if args.model.use_lora:
        model.save_pretrained(folder, save_embedding_layers=False)
        result = fuse_lora(base, str(folder), trusted)
        folder = folder / FUSED_FOLDER
    elif args.model.train == SCALES:
        result = fuse_scales(base, model, trusted)
    elif args.model.train == BLOCK_WEIGHTS:
        result = with_trained_weights(base, model, trusted)
    else:
        # Without the autocast of its forward in training.
        result = extract_model_from_parallel(model.cpu(), keep_fp32_wrapper=False)
        cast_parameters(result, dtype)
    if pruned:
        # The adapters are masked, but the base that they are fused into may not be.
        zero_removed(result, pruned.family, pruned.masks)
    save_checkpoint(result, tokenizer, folder)
    if pruned:
        if args.sparse.save_pruned_weights:
            save_checkpoint(shrink(result, pruned.family, pruned.masks), tokenizer, folder / PRUNED_MODEL_FOLDER)
        # Reload, so that masks and perplexity are measured on the saved weights.
        result = load_model(str(folder), "auto", trusted)
    return result


def write_unit_records(
    args: FinetuneArguments,
    folder: Path,
    base_provenance: dict[str, Any],
    units: ModelUnits,
    pruned: ModelMasks | None,
) -> None:
    """Write ``pruning.json`` beside every checkpoint in ``folder`` of a model that is or was pruned.

    Args:
        args: flags of the run.
        folder: output folder of :func:`save_result`.
        base_provenance: provenance of the base model.
        units: units of the base model.
        pruned: masks of the model, if it is trained with masks.
    """
    folder = folder / FUSED_FOLDER if args.model.use_lora else folder
    if not pruned:
        if pruning_steps(base_provenance):
            write_units(folder / PRUNING_FILE, units)
        return
    write_pruning(folder / PRUNING_FILE, units, pruned.masks)
    if args.sparse.save_pruned_weights:
        write_units(folder / PRUNED_MODEL_FOLDER / PRUNING_FILE, units.pruned(pruned.masks))


def write_cards(
    args: FinetuneArguments,
    folder: Path,
    record: dict[str, Any],
    base_provenance: dict[str, Any],
    pruned: ModelMasks | None,
    saved: PreTrainedModel,
) -> None:
    """Write model card, ``slimgpt.json`` and licence files beside every checkpoint in ``folder``.

    Called after saving, and again once the perplexities are measured.

    Args:
        args: flags of the run.
        folder: output folder of :func:`save_result`.
        record: content of ``run.json``; its ``provenance`` is set to that of the result.
        base_provenance: provenance of the base model.
        pruned: masks of the model, if it is trained with masks.
        saved: the saved model.
    """
    provenance = base_provenance
    if pruned and not pruning_steps(provenance):
        masks = Path(args.sparse.mask_config_dir or args.model.model_name_or_path)
        remaining = remaining_weights(pruned.family.decoder_layers(saved), pruned.family, pruned.masks)
        provenance = with_step(provenance, pruning_step([("masks", masks.name)], remaining))
    step = recovery_step(recovery_settings(args, record, saved), hub_datasets(record["data"]["sources"]))
    record["provenance"] = with_step(provenance, step)
    options = {"masks": pruned and pruned.masks, "perplexity": record.get("perplexity")}
    folder = folder / FUSED_FOLDER if args.model.use_lora else folder
    for checkpoint in (folder, folder / PRUNED_MODEL_FOLDER):
        if checkpoint.is_dir():
            write_card(checkpoint, record["provenance"], args.model.model_name_or_path, **options)


def recovery_settings(args: FinetuneArguments, record: dict[str, Any], saved: PreTrainedModel) -> list[tuple[str, Any]]:
    """Names and values of a fine-tuning run for the model card.

    Args:
        args: flags of the run.
        record: content of its ``run.json``.
        saved: the saved model.
    """
    model, training, data = args.model, args.training, record["data"]
    trained = TRAINED_PARTS[model.trained_part]
    if model.use_lora:
        targets = lora_targets(saved, model.peft_target_modules)
        names = targets if isinstance(targets, str) else ",".join(targets)
        trained = f"LoRA adapters of rank {model.peft_lora_r} on {names}, fused"
    return [
        ("trained", trained),
        ("pruned weights kept at zero", "yes" if args.sparse.is_mask_training else "no"),
        ("teacher", public_name(model.distill_from) if model.distill_from else "none"),
        ("data", " + ".join(map(public_name, data["sources"]))),
        ("windows" if args.data.train_text else "samples", data["train_samples"]),
        ("their fingerprint (sha256)", data["sha256"]),
        ("epochs", f"{record['log'][-1]['epoch']:g}"),
        *([("step with the lowest held-out loss", record["held_out"]["kept_step"])] if "held_out" in record else []),
        (
            "samples of a step",
            training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size,
        ),
        ("learning rate", f"{training.learning_rate:g}"),
        ("versions", version_list(record)),
    ]


def mask_record(mask: MaskCallback, pruned: ModelMasks, saved: PreTrainedModel) -> dict[str, int]:
    """Number of masked weights, of those nonzero in the saved model, and of those that the optimizer moved."""
    nonzeros, total = pruned.count(saved)
    record = {
        "masked_weights": total,
        "nonzero_after_training": nonzeros,
        "moved_by_optimizer": int(mask.moved),
        "optimizer_steps": mask.steps,
    }
    logger.info("mask: %s", ", ".join(f"{name} {value}" for name, value in record.items()))
    return record
