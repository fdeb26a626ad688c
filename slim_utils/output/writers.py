"""The output folder of a pruning run: its checkpoints, written whole at the end or layer by layer, and its records."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from slim_utils.common.errors import annotate_errors
from slim_utils.common.loading import (
    PRUNED_MODEL_FOLDER,
    RUN_FILE,
    atomic_folder,
    save_checkpoint,
    save_tensors_atomic,
    write_json_atomic,
)
from slim_utils.families import Family
from slim_utils.layerwise.offload import CPU, OffloadedModel
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
from slim_utils.output.run_record import RunRecord
from slim_utils.params_remove import pruned_on_meta, shrink, shrink_layer, zero_layer, zero_removed
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.text_source import hub_datasets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CheckpointWriter(ABC):
    """The checkpoints of a run: the zeroed model in its original shapes and, if asked, the small one.

    Attributes:
        model: that is pruned.
        family: its row of the table.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family

    @abstractmethod
    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write them into ``folder``.

        Returns:
            The small model, if there is one; its weights may be on the meta device.
        """


class WholeOutput(CheckpointWriter):
    """The checkpoints of a model that is in host memory as a whole.

    Args:
        model: pruned; it ends zeroed in its original shapes.
        family: its row of the table.
        small_model: write the small model too.
        uniform_shapes: of the library's own class.
    """

    def __init__(self, model: PreTrainedModel, family: Family, small_model: bool, uniform_shapes: bool) -> None:
        super().__init__(model, family)
        self.small_model, self.uniform_shapes = small_model, uniform_shapes

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        zero_removed(self.model, self.family, masks)
        save_checkpoint(self.model, tokenizer, folder)
        if not self.small_model:
            return None
        small = shrink(self.model, self.family, masks, self.uniform_shapes)
        save_checkpoint(small, tokenizer, folder / PRUNED_MODEL_FOLDER)
        return small


class CheckpointShards:
    """One checkpoint in the making, shard by shard.

    Args:
        folder: made if missing.
        model: of its classes and shapes; no weights of it are looked at.
        family: its row of the table.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, family: Family) -> None:
        self.folder, self.model, self.family = folder, model, family
        self._total = len(family.decoder_layers(model)) + 1
        folder.mkdir(parents=True, exist_ok=True)
        # What a run that was cut off had begun to write beside whole shards.
        for entry in folder.iterdir():
            if entry.is_dir() and entry.name != PRUNED_MODEL_FOLDER:
                shutil.rmtree(entry)
            elif entry.is_file() and entry not in map(self._path, range(self._total)):
                entry.unlink()

    def has_layer(self, index: int) -> bool:
        """Whether that layer was written."""
        return self._path(index).exists()

    def write_layer(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of a layer, by their names in it."""
        self._write(index, {f"{self.family.layers}.{index}.{name}": tensor for name, tensor in tensors.items()})

    def write_outside(self, tensors: dict[str, Tensor]) -> None:
        """Write what is outside of the layers."""
        self._write(self._total - 1, tensors)

    def finish(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write everything but weights: the index of the shards, configuration, code, tokenizer."""
        places: dict[str, str] = {}
        for number in range(self._total):
            with safe_open(self._path(number), "pt") as file:
                places |= dict.fromkeys(file.keys(), self._path(number).name)
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json_atomic(self.folder / SAFE_WEIGHTS_INDEX_NAME, content)
        # The library would take the shards for those of an earlier save.
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            save_checkpoint(self.model, tokenizer, Path(name), state_dict={})
            for entry in Path(name).iterdir():
                entry.replace(self.folder / entry.name)

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        # Experts are stored one by one, whatever they are in memory.
        from transformers.core_model_loading import revert_weight_conversion

        stored = revert_weight_conversion(self.model, tensors)
        save_tensors_atomic(stored, self._path(number), {"format": "pt"})

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05}-of-{self._total:05}.safetensors"


class StreamedOutput(CheckpointWriter):
    """The checkpoints of a streamed run, written while it goes: a shard a layer, and one for what is outside of them.

    Args:
        folder: where they are made.
        host: brings the layers, and says when one is settled.
        planned: masks of the sizes that pruning will give.
        small_model: make the small one too.
        uniform_shapes: of the library's own class.
    """

    def __init__(
        self, folder: Path, host: OffloadedModel, planned: list[LayerMask], small_model: bool, uniform_shapes: bool
    ) -> None:
        super().__init__(host.model, host.family)
        self.host, self.folder = host, folder
        self.zeroed = CheckpointShards(folder, host.model, host.family)
        self.small: CheckpointShards | None = None
        if not small_model:
            shutil.rmtree(folder / PRUNED_MODEL_FOLDER, ignore_errors=True)
        else:
            skeleton = pruned_on_meta(host.model, host.family, planned, uniform_shapes)
            self.small = CheckpointShards(folder / PRUNED_MODEL_FOLDER, skeleton, host.family)
        host.on_settled = self._write_layer

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write what is missing yet, and move all into ``folder``, of the same disk."""
        for index, mask in enumerate(masks):
            # The layer-wise pruner stops after the last pruned layer.
            if not self._has_layer(index):
                self.host.onload(index, CPU)
                self.host.offload(index, mask)
        outside = self.host.read_non_layer_tensors()
        for shards in self._checkpoints():
            shards.write_outside(outside)
            shards.finish(tokenizer)
        for entry in list(self.folder.iterdir()):
            entry.replace(folder / entry.name)
        return self.small and self.small.model

    def _checkpoints(self) -> list[CheckpointShards]:
        return [self.zeroed, self.small] if self.small else [self.zeroed]

    def _has_layer(self, index: int) -> bool:
        return all(shards.has_layer(index) for shards in self._checkpoints())

    def _write_layer(self, index: int, layer: nn.Module, mask: LayerMask) -> None:
        if self._has_layer(index):
            return
        if self.small:
            self.small.write_layer(index, shrink_layer(layer, self.family, mask))
        zero_layer(layer, self.family, mask)
        self.zeroed.write_layer(index, layer.state_dict())


def write_output(
    save_dir: Path,
    output: CheckpointWriter,
    tokenizer: PreTrainedTokenizerBase,
    masks: list[LayerMask],
    record: RunRecord,
) -> None:
    """Write ``save_dir``, whole or not at all.

    Args:
        save_dir: the folder.
        output: what writes the checkpoints.
        tokenizer: the model's.
        masks: a mask a layer.
        record: content of ``run.json``; completed by the sizes and the provenance of the output.
    """
    with atomic_folder(save_dir) as folder:
        small = output.write(folder, masks, tokenizer)
        if small is not None:
            record.sizes.parameters_pruned = count_parameters(small)
        remaining = remaining_weights(output.family.decoder_layers(output.model), output.family, masks)
        texts = hub_datasets(source["name"] for source in record.calibration["sources"])
        step = pruning_step(pruning_settings(record.to_json()), remaining, texts)
        record.provenance = with_step(record.provenance, step)
        record.sizes.block_share_removed_in_total = total_share_removed(record.provenance)
        write_provenance(folder, record.provenance)
        copy_license_files(record.arguments["model_path"], folder)
        write_pruning(folder / PRUNING_FILE, masks, output.model.config.model_type)
        write_record(folder, masks, record)


@contextmanager
def saved_before(save_dir: str) -> Iterator[None]:
    """While the output, if there is a ``save_dir``, is evaluated: whatever fails, the message says that it is saved."""
    note = f"{save_dir} is saved, but not evaluated; --resume evaluates it, --resume --skip_evaluate ends without"
    with annotate_errors(note) if save_dir else nullcontext():
        yield


def write_record(folder: Path, masks: list[LayerMask], record: RunRecord) -> None:
    """Write ``run.json``, and the model card that is made from it where there is a small model."""
    write_json_atomic(folder / RUN_FILE, record.to_json())
    arguments = record.arguments
    if arguments["save_pruned_weights"]:
        write_card(
            folder / PRUNED_MODEL_FOLDER,
            record.provenance,
            arguments["model_path"],
            masks=masks,
            perplexity=record.perplexity,
            address=arguments["push_to_hub"] or "DIR",
        )
