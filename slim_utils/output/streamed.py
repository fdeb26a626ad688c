"""The checkpoints of a streamed run, written while it goes: a shard a layer, and one for what is outside of them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from slim_utils.common.loading import SMALL_MODEL_FOLDER, save_checkpoint, save_tensors_atomic, write_json_atomic
from slim_utils.families import Family
from slim_utils.layerwise.offload import CPU, StreamedHost
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink_layer, small_on_meta, zero_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CheckpointShards:
    """One checkpoint in the making.

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
            if entry.is_dir() and entry.name != SMALL_MODEL_FOLDER:
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
        from transformers.core_model_loading import revert_weight_conversion

        # Experts are stored one by one, whatever they are in memory.
        stored = revert_weight_conversion(self.model, tensors)
        save_tensors_atomic(stored, self._path(number), {"format": "pt"})

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05}-of-{self._total:05}.safetensors"


class StreamedOutput:
    """The zeroed model in its original shapes and, if asked, the small one.

    Args:
        folder: where they are made.
        host: brings the layers, and says when one is settled.
        planned: masks of the sizes that pruning will give.
        small_model: make the small one too.
        uniform_shapes: of the library's own class.
    """

    def __init__(
        self, folder: Path, host: StreamedHost, planned: list[LayerMask], small_model: bool, uniform_shapes: bool
    ) -> None:
        self.host, self.model, self.family, self.folder = host, host.model, host.family, folder
        self.zeroed = CheckpointShards(folder, host.model, host.family)
        self.small: CheckpointShards | None = None
        if not small_model:
            shutil.rmtree(folder / SMALL_MODEL_FOLDER, ignore_errors=True)
        else:
            skeleton = small_on_meta(host.model, host.family, planned, uniform_shapes)
            self.small = CheckpointShards(folder / SMALL_MODEL_FOLDER, skeleton, host.family)
        host.on_settled = self._write_layer

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write what is missing yet, and move all into ``folder``, of the same disk; the small model, if any."""
        for index, mask in enumerate(masks):
            # The walk does not come to layers beyond the last pruned one.
            if not self._has_layer(index):
                self.host.fetch(index, CPU)
                self.host.release(index, mask)
        outside = self.host.read_outside()
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
