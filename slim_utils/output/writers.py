"""Output folder of a pruning run: checkpoints, written at the end or layer by layer, and records."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from slim_utils.common.atomic_output import atomic_folder, save_tensors_atomic, write_json_atomic
from slim_utils.common.errors import annotate_errors
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, save_checkpoint
from slim_utils.common.output_folder import RUN_FILE
from slim_utils.families import Family
from slim_utils.layerwise.offload import CPU, OffloadedModel
from slim_utils.masks import PRUNING_FILE, LayerMask, ModelUnits, write_pruning, write_units
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
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run.

    Attributes:
        masked: whether the masked model is saved, in its original shapes.
        pruned: whether the pruned model is saved.
        stock: whether the pruned model is of the stock class.
    """

    masked: bool
    pruned: bool
    stock: bool


class CheckpointWriter(ABC):
    """Writer of the checkpoints of a run.

    Attributes:
        model: model that is pruned.
        family: family of the model.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family

    @abstractmethod
    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write the checkpoints into ``folder``.

        Returns:
            The pruned model, if requested; its weights may be on the meta device.
        """


class WholeOutput(CheckpointWriter):
    """Writer for a model that is in host memory.

    Args:
        model: the model; masked in place when written.
        family: family of the model.
        checkpoints: what to write.
    """

    def __init__(self, model: PreTrainedModel, family: Family, checkpoints: Checkpoints) -> None:
        super().__init__(model, family)
        self.checkpoints = checkpoints

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        zero_removed(self.model, self.family, masks)
        if self.checkpoints.masked:
            save_checkpoint(self.model, tokenizer, folder)
        if not self.checkpoints.pruned:
            return None
        pruned_model = shrink(self.model, self.family, masks, self.checkpoints.stock)
        save_checkpoint(pruned_model, tokenizer, folder / PRUNED_MODEL_FOLDER)
        return pruned_model


class CheckpointShards:
    """A checkpoint that is written shard by shard.

    Args:
        folder: checkpoint folder, created if missing.
        model: model with the classes and shapes of the checkpoint; its weights are not used.
        family: family of the model.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, family: Family) -> None:
        self.folder, self.model, self.family = folder, model, family
        self._total = len(family.decoder_layers(model)) + 1
        folder.mkdir(parents=True, exist_ok=True)
        # Partial files of an interrupted run beside its complete shards.
        for entry in folder.iterdir():
            if entry.is_dir() and entry.name != PRUNED_MODEL_FOLDER:
                shutil.rmtree(entry)
            elif entry.is_file() and entry not in map(self._path, range(self._total)):
                entry.unlink()

    def has_layer(self, index: int) -> bool:
        """Whether the shard of layer ``index`` is written."""
        return self._path(index).exists()

    def write_layer(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write the shard of layer ``index``; ``tensors`` by their names in the layer."""
        self._write(index, {f"{self.family.layers}.{index}.{name}": tensor for name, tensor in tensors.items()})

    def write_non_layer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Write the shard of the tensors outside the decoder layers."""
        self._write(self._total - 1, tensors)

    def finish(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write everything except weights: the index of the shards, configuration, code, tokenizer."""
        weight_map: dict[str, str] = {}
        for number in range(self._total):
            with safe_open(self._path(number), "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), self._path(number).name)
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomic(self.folder / SAFE_WEIGHTS_INDEX_NAME, content)
        # Saved elsewhere first: save_pretrained would remove the shards as those of an earlier save.
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            save_checkpoint(self.model, tokenizer, Path(name), state_dict={})
            for entry in Path(name).iterdir():
                entry.replace(self.folder / entry.name)

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        # Experts are stored individually, whatever their format in memory.
        from transformers.core_model_loading import revert_weight_conversion

        stored = revert_weight_conversion(self.model, tensors)
        save_tensors_atomic(stored, self._path(number), {"format": "pt"})

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05}-of-{self._total:05}.safetensors"


class StreamedOutput(CheckpointWriter):
    """Writer of a streamed run: one shard per layer, written as soon as the layer is done, and one for other tensors.

    Args:
        folder: temporary folder of the checkpoints.
        host: offloaded model, which calls back when a layer is done.
        planned: masks with the planned sizes.
        checkpoints: what to write.
    """

    def __init__(self, folder: Path, host: OffloadedModel, planned: list[LayerMask], checkpoints: Checkpoints) -> None:
        super().__init__(host.model, host.family)
        self.host, self.folder, self.checkpoints = host, folder, checkpoints
        self.masked = CheckpointShards(folder, host.model, host.family) if checkpoints.masked else None
        self.pruned: CheckpointShards | None = None
        if not checkpoints.pruned:
            shutil.rmtree(folder / PRUNED_MODEL_FOLDER, ignore_errors=True)
        else:
            skeleton = pruned_on_meta(host.model, host.family, planned, checkpoints.stock)
            self.pruned = CheckpointShards(folder / PRUNED_MODEL_FOLDER, skeleton, host.family)
        host.on_settled = self._write_layer

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write the missing shards, and move all files into ``folder``, which is on the same disk."""
        for index, mask in enumerate(masks):
            # Layers after the last pruned one were never onloaded.
            if not self._has_layer(index):
                self.host.onload(index, CPU)
                self.host.offload(index, mask)
        if self.pruned:
            # The planned masks have the sizes alone; a configuration may list the heads that are kept.
            self.pruned.model = pruned_on_meta(self.model, self.family, masks, self.checkpoints.stock)
        non_layer_tensors = self.host.read_non_layer_tensors()
        for shards in self._checkpoints():
            shards.write_non_layer_tensors(non_layer_tensors)
            shards.finish(tokenizer)
        for entry in list(self.folder.iterdir()):
            entry.replace(folder / entry.name)
        return self.pruned and self.pruned.model

    def _checkpoints(self) -> list[CheckpointShards]:
        return [shards for shards in (self.masked, self.pruned) if shards]

    def _has_layer(self, index: int) -> bool:
        return all(shards.has_layer(index) for shards in self._checkpoints())

    def _write_layer(self, index: int, layer: nn.Module, mask: LayerMask) -> None:
        if self._has_layer(index):
            return
        if self.pruned:
            self.pruned.write_layer(index, shrink_layer(layer, self.family, mask))
        if self.masked:
            zero_layer(layer, self.family, mask)
            self.masked.write_layer(index, layer.state_dict())


def write_output(
    save_dir: Path,
    output: CheckpointWriter,
    tokenizer: PreTrainedTokenizerBase,
    units: ModelUnits,
    masks: list[LayerMask],
    record: RunRecord,
    count_target: Callable[[PreTrainedConfig], dict[str, Any]] | None = None,
) -> None:
    """Write the output folder ``save_dir`` atomically.

    Args:
        save_dir: output folder.
        output: writer of the checkpoints.
        tokenizer: tokenizer of the model.
        units: units of the model before this run.
        masks: one mask per layer.
        record: content of ``run.json``; sizes and provenance are added.
        count_target: returns the sizes of ``record.target`` for the configuration of the pruned model.
    """
    with atomic_folder(save_dir) as folder:
        pruned_model = output.write(folder, masks, tokenizer)
        if pruned_model is not None:
            record.sizes.parameters_pruned = count_parameters(pruned_model)
            record.target = count_target(pruned_model.config) if count_target else None
            write_units(folder / PRUNED_MODEL_FOLDER / PRUNING_FILE, units.pruned(masks))
        remaining = remaining_weights(output.family.decoder_layers(output.model), output.family, masks)
        texts = hub_datasets(source["name"] for source in record.calibration["sources"])
        step = pruning_step(pruning_settings(record.to_json()), remaining, texts, record.calibration["ngrams"])
        record.provenance = with_step(record.provenance, step)
        record.sizes.block_share_removed_in_total = total_share_removed(record.provenance)
        write_provenance(folder, record.provenance)
        copy_license_files(record.arguments["model_path"], folder)
        write_pruning(folder / PRUNING_FILE, units, masks)
        write_record(folder, masks, record)


@contextmanager
def note_saved_output(save_dir: str) -> Iterator[None]:
    """Add to errors of the evaluation that the output in ``save_dir``, if any, is already saved."""
    note = f"{save_dir} is saved, but not evaluated; --resume evaluates it, --resume --skip_evaluate skips this"
    with annotate_errors(note) if save_dir else nullcontext():
        yield


def write_record(folder: Path, masks: list[LayerMask], record: RunRecord) -> None:
    """Write ``run.json`` and, if there is a pruned model, its model card."""
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
