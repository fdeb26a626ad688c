"""Model storage: in host memory, or on disk with prefetch of one layer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from slim_utils.common.checkpoint_checks import log_untied_head
from slim_utils.common.loading import load_model
from slim_utils.families import Family, find_family
from slim_utils.masks import LayerMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")


class ResidentModel:
    """A model in host memory.

    Args:
        model: on the CPU.
        family: its row of the table.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        self.family = family
        self.layers = family.decoder_layers(model)

    def close(self) -> None:
        """Close the files that layers are read from."""

    @contextmanager
    def non_layer_modules(self, device: torch.device = CPU) -> Iterator[None]:
        """Context in which the non-layer modules (embeddings, last norm, head) are on ``device``."""
        prefix = f"{self.family.layers}."
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        moved = [tensor for name, tensor in named if not name.startswith(prefix)]
        try:
            for tensor in moved:
                tensor.data = tensor.data.to(device)
            yield
        finally:
            for tensor in moved:
                tensor.data = tensor.data.to(CPU)

    def onload(self, index: int, device: torch.device) -> nn.Module:
        """Bring layer ``index`` to ``device`` and return it."""
        return self.layers[index].to(device)

    def drop_prefetch(self) -> None:
        """Free the device memory of a prefetched layer."""

    def offload(self, index: int, mask: LayerMask | None = None) -> None:
        """Move layer ``index`` back to its storage; ``mask`` is its final mask, once the layer is finished."""
        self.layers[index].to(CPU)

    def sampled_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, for a fingerprint."""
        yield from self.model.named_parameters()


# Index of a layer, its device, and the tensors that a thread is reading.
_Prefetch: TypeAlias = tuple[int, torch.device, Future]


class OffloadedModel(ResidentModel):
    """A model whose weights stay on disk; a layer is in memory from :meth:`onload` to :meth:`offload`.

    A thread reads the next layer, and transfers it to the GPU, while the current one is processed.

    Args:
        model_path: checkpoint folder or hub name.
        dtype: a key of ``DTYPES``.
        trust_remote_code: run model code found in the checkpoint.
        scratch: folder of this process for weights that the library converts when it loads them (fused experts).
        language_model: of a multimodal model, load its language model alone.
    """

    def __init__(
        self, model_path: str, dtype: str, trust_remote_code: bool, scratch: Path, language_model: bool = False
    ) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self._scratch = scratch
        try:
            # Warnings about disk offload, which is intended here.
            with _quiet("accelerate.big_modeling", "transformers.distributed.tensor_parallel"):
                on_disk = {"device_map": {"": "disk"}, "offload_folder": scratch}
                model = load_model(model_path, dtype, trust_remote_code, language_model, **on_disk)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        # Location of every parameter: file, name in the file, dtype.
        self._places = _offload_index(model)
        if _settle_ties(model, self._places):
            log_untied_head(model_path)
        # From here on this class alone loads and frees layers.
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map
        super().__init__(model, find_family(model.config))
        # Meta tensors in place of offloaded parameters; tied parameters share one.
        self._absent = model.state_dict()
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._prefetched: _Prefetch | None = None
        self._stream: torch.cuda.Stream | None = None
        # Called with every finished layer while it is in memory.
        self.on_settled: Callable[[int, nn.Module, LayerMask], None] | None = None

    def close(self) -> None:
        """Stop the reader and remove the scratch folder."""
        self._reader.shutdown(cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def non_layer_names(self) -> list[str]:
        """Names of the stored non-layer parameters, tied weights once."""
        tied = self.model.all_tied_weights_keys
        return [name for name in self._places if not name.startswith(f"{self.family.layers}.") and name not in tied]

    @contextmanager
    def non_layer_modules(self, device: torch.device = CPU) -> Iterator[None]:
        """Context in which the non-layer modules are loaded, on ``device``."""
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if not buffer.is_meta}
        self._assign(self.model, self._read(self.non_layer_names(), device))
        for name, buffer in buffers.items():
            self._set_buffer(name, buffer.to(device))
        self.model.tie_weights()
        try:
            yield
        finally:
            self._assign(self.model, {name: self._absent[name] for name in self.non_layer_names()})
            for name, buffer in buffers.items():
                self._set_buffer(name, buffer)
            self.model.tie_weights()

    def onload(self, index: int, device: torch.device) -> nn.Module:
        """Read layer ``index`` from disk to ``device`` and return it."""
        ahead = self._prefetched
        if ahead is None or ahead[:2] != (index, device):
            ahead = self._prefetch(index, device)
        try:
            tensors = ahead[2].result()
        except torch.OutOfMemoryError:
            # The previous layer took the memory; it is offloaded by now.
            torch.cuda.empty_cache()
            tensors = self._read_layer(index, device)
        self._prefetched = None
        if index + 1 < len(self.layers):
            self._prefetch(index + 1, device)
        layer = self.layers[index]
        self._assign(layer, tensors)
        # Buffers that are not stored, such as per-layer rotary frequencies.
        for module in layer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        return layer

    def drop_prefetch(self) -> None:
        """Drop the prefetched layer."""
        if self._prefetched is not None and not self._prefetched[2].cancel():
            with suppress(torch.OutOfMemoryError):
                self._prefetched[2].result()
        self._prefetched = None

    def offload(self, index: int, mask: LayerMask | None = None) -> None:
        """Free a layer's weights; where ``mask`` is given, ``on_settled`` is called first."""
        layer = self.layers[index]
        if mask is not None and self.on_settled is not None:
            self.on_settled(index, layer, mask)
        prefix = self._prefix(index)
        self._assign(layer, {name: self._absent[prefix + name] for name in self._layer_names(index)})

    def sampled_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor by name, mapped from disk: only the pages accessed are read."""
        for name in sorted(self._places):
            place = self._places[name]
            with safe_open(place["safetensors_file"], "pt") as file:
                yield name, file.get_tensor(place["weight_name"])

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of layer ``index`` by their names in the layer, on the CPU."""
        return self._read_layer(index, CPU)

    def read_non_layer_tensors(self) -> dict[str, Tensor]:
        """The stored non-layer tensors, on the CPU."""
        return self._read(self.non_layer_names(), CPU)

    def _prefix(self, index: int) -> str:
        return f"{self.family.layers}.{index}."

    def _layer_names(self, index: int) -> list[str]:
        prefix = self._prefix(index)
        return [name.removeprefix(prefix) for name in self._places if name.startswith(prefix)]

    def _prefetch(self, index: int, device: torch.device) -> _Prefetch:
        self._prefetched = index, device, self._reader.submit(self._read_layer, index, device)
        return self._prefetched

    def _read_layer(self, index: int, device: torch.device) -> dict[str, Tensor]:
        prefix = self._prefix(index)
        tensors = self._read([prefix + name for name in self._layer_names(index)], device)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _read(self, names: list[str], device: torch.device) -> dict[str, Tensor]:
        """Tensors of the given names; transfers to a GPU use a separate stream."""
        if device.type != "cuda":
            return {name: self._read_one(name) for name in names}
        # One stream for all: the allocator reuses memory within a stream only.
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            staged = {name: self._read_one(name).pin_memory() for name in names}
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in staged.items()}
            self._stream.synchronize()
        for tensor in tensors.values():
            # Keep the allocator from reusing the memory while the default stream computes with it.
            tensor.record_stream(torch.cuda.default_stream(device))
        return tensors

    def _read_one(self, name: str) -> Tensor:
        """One tensor, read by ``pread``: pages of a mapped file would count as this process's memory."""
        place = self._places[name]
        with safe_open(place["safetensors_file"], "pt", backend="pread") as file:
            return file.get_tensor(place["weight_name"]).to(getattr(torch, place["dtype"]))

    @staticmethod
    def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
        module.load_state_dict(tensors, assign=True, strict=False)

    def _set_buffer(self, name: str, buffer: Tensor) -> None:
        path, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(path), own, buffer)


def _settle_ties(model: PreTrainedModel, places: dict[str, dict[str, str]]) -> bool:
    """Locate tied weights, which may be stored under either name.

    Returns:
        Whether a tied pair is stored with different values; such a pair is untied, as when loading into memory.
    """
    apart = False
    for target, source in list(model.all_tied_weights_keys.items()):
        stored = [places[name] for name in (source, target) if name in places]
        if source not in places and stored:
            places[source] = stored[0]
        tensors = []
        for place in stored:
            with safe_open(place["safetensors_file"], "pt") as file:
                tensors.append(file.get_tensor(place["weight_name"]))
        if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            del model.all_tied_weights_keys[target]
            apart = True
    if apart:
        model.config.tie_word_embeddings = False
    return apart


def _offload_index(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Accelerate's index of the weights on disk."""
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    weights = next(hook.weights_map for hook in hooks if getattr(hook, "weights_map", None) is not None)
    return weights.dataset.index


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
