"""The output folder of a pruning run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slim_utils.common.errors import noted
from slim_utils.common.loading import (
    RUN_FILE,
    SMALL_MODEL_FOLDER,
    atomic_folder,
    save_checkpoint,
    write_json_atomic,
)
from slim_utils.families import Family
from slim_utils.masks import PRUNING_FILE, LayerMask, write_pruning
from slim_utils.output.model_card import pruning_settings, write_card
from slim_utils.output.provenance import (
    copy_license_files,
    pruning_step,
    remaining_weights,
    total_share_removed,
    with_step,
    write_provenance,
)
from slim_utils.output.streamed import StreamedOutput
from slim_utils.params_remove import shrink, zero_removed
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.text_source import hub_datasets


class WholeOutput:
    """The checkpoints of a model that is in host memory as a whole.

    Args:
        model: pruned; it ends zeroed in its original shapes.
        family: its row of the table.
        small_model: write the small model too.
        uniform_shapes: of the library's own class.
    """

    def __init__(self, model: PreTrainedModel, family: Family, small_model: bool, uniform_shapes: bool) -> None:
        self.model, self.family = model, family
        self.small_model, self.uniform_shapes = small_model, uniform_shapes

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write them into ``folder``; the small model, if there is one."""
        zero_removed(self.model, self.family, masks)
        save_checkpoint(self.model, tokenizer, folder)
        if not self.small_model:
            return None
        small = shrink(self.model, self.family, masks, self.uniform_shapes)
        save_checkpoint(small, tokenizer, folder / SMALL_MODEL_FOLDER)
        return small


def write_output(
    save_dir: Path,
    output: WholeOutput | StreamedOutput,
    tokenizer: PreTrainedTokenizerBase,
    masks: list[LayerMask],
    record: dict[str, Any],
) -> None:
    """Write ``save_dir``, whole or not at all.

    Args:
        save_dir: the folder.
        output: what writes the checkpoints.
        tokenizer: the model's.
        masks: a mask a layer.
        record: content of ``run.json``.
    """
    with atomic_folder(save_dir) as folder:
        small = output.write(folder, masks, tokenizer)
        if small is not None:
            record["sizes"]["parameters_pruned"] = count_parameters(small)
        remaining = remaining_weights(output.family.decoder_layers(output.model), output.family, masks)
        texts = hub_datasets(source["name"] for source in record["calibration"]["sources"])
        step = pruning_step(pruning_settings(record), remaining, texts)
        record["provenance"] = with_step(record["provenance"], step)
        record["sizes"]["block_share_removed_in_total"] = total_share_removed(record["provenance"])
        write_provenance(folder, record["provenance"])
        copy_license_files(record["arguments"]["model_path"], folder)
        write_pruning(folder / PRUNING_FILE, masks, output.model.config.model_type)
        write_record(folder, masks, record)


@contextmanager
def saved_before(save_dir: str) -> Iterator[None]:
    """While the output, if there is a ``save_dir``, is evaluated: whatever fails, the message says that it is saved."""
    note = f"{save_dir} is saved, but not evaluated; --resume evaluates it, --resume --skip_evaluate ends without"
    with noted(note) if save_dir else nullcontext():
        yield


def write_record(folder: Path, masks: list[LayerMask], record: dict[str, Any]) -> None:
    """Write ``run.json``, and the model card that is made from it where there is a small model."""
    write_json_atomic(folder / RUN_FILE, record)
    arguments = record["arguments"]
    if arguments["save_pruned_weights"]:
        write_card(
            folder / SMALL_MODEL_FOLDER,
            record["provenance"],
            arguments["model_path"],
            masks=masks,
            perplexity=record.get("perplexity"),
            address=arguments["push_to_hub"] or "DIR",
        )
