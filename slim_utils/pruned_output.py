"""The output folder of a pruning run."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slim_utils.families import Family
from slim_utils.model_card import CARD_FILE, copy_license_files, model_card
from slim_utils.model_io import (
    RUN_FILE,
    SMALL_MODEL_FOLDER,
    atomic_folder,
    load_config,
    save_checkpoint,
    write_json_atomic,
    write_text_atomic,
)
from slim_utils.model_stats import count_parameters
from slim_utils.params_remove import shrink, zero_removed
from slim_utils.pruning_record import PRUNING_FILE, LayerMask, write_pruning


def write_output(
    save_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    masks: list[LayerMask],
    record: dict[str, Any],
) -> None:
    """Write ``save_dir``, whole or not at all; ``model`` ends zeroed in its original shapes.

    Args:
        save_dir: the folder.
        model: pruned.
        tokenizer: the model's.
        family: its row of the table.
        masks: a mask a layer.
        record: content of ``run.json``; its arguments say whether there is a small model, and in what form.
    """
    arguments = record["arguments"]
    zero_removed(model, family, masks)
    with atomic_folder(save_dir) as folder:
        save_checkpoint(model, tokenizer, folder)
        if arguments["save_pruned_weights"]:
            small = shrink(model, family, masks, arguments["uniform_shapes"])
            record["sizes"]["parameters_pruned"] = count_parameters(small)
            save_checkpoint(small, tokenizer, folder / SMALL_MODEL_FOLDER)
            copy_license_files(arguments["model_path"], folder / SMALL_MODEL_FOLDER)
        write_pruning(folder / PRUNING_FILE, masks, model.config.model_type)
        write_record(folder, masks, record)


def write_record(folder: Path, masks: list[LayerMask], record: dict[str, Any]) -> None:
    """Write ``run.json``, and the model card that is made from it where there is a small model."""
    write_json_atomic(folder / RUN_FILE, record)
    if record["arguments"]["save_pruned_weights"]:
        small = folder / SMALL_MODEL_FOLDER
        write_text_atomic(small / CARD_FILE, model_card(record, load_config(str(small), False), masks))
