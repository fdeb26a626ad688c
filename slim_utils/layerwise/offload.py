"""Where decoder layers are while they are not at work: all in host memory, or on disk, to be brought one by one."""

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

from slim_utils.common.checkpoint_checks import log_own_head
from slim_utils.common.loading import load_model
from slim_utils.families import Family, find_family
from slim_utils.masks import LayerMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")


class ResidentModel:
    """A model that is in host memory as a whole.

    Args:
        model: on the CPU.
        family: its row of the table.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        self.family = family
        self.layers = family.decoder_layers(model)

    def close(self) -> None:
        """Let go of what the layers came from."""

    @contextmanager
    def non_layer_modules(self, device: torch.device = CPU) -> Iterator[None]:
        """While what is outside of the layers (embeddings, last norm, head) is in use, on ``device``."""
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
        """Layer ``index``, on ``device``."""
        return self.layers[index].to(device)

    def drop_prefetch(self) -> None:
        """Let go of all device memory that can be had again."""

    def offload(self, index: int, mask: LayerMask | None = None) -> None:
        """Take a layer back that :meth:`onload` gave; ``mask`` is what it keeps for good, if that is settled."""
        self.layers[index].to(CPU)

    def sampled_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, to look at some values of."""
        yield from self.model.named_parameters()


# A layer, the device it is to be on, and its tensors to come.
_Prefetch: TypeAlias = tuple[int, torch.device, Future]


class OffloadedModel(ResidentModel):
    """A model whose weights stay on disk; a layer is in memory from :meth:`onload` to :meth:`offload`.

    While a layer is at work a thread reads the next one, and brings it to the GPU beside what that computes.

    Args:
        model_path: checkpoint folder or hub name.
        dtype: a key of ``DTYPES``.
        trust_remote_code: run model code found in the checkpoint.
        scratch: folder for weights that the library does not use as they are stored (fused experts), of this process
            alone.
    """

    def __init__(self, model_path: str, dtype: str, trust_remote_code: bool, scratch: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        self._scratch = scratch
        try:
            # The library's and accelerate's remarks on what is wanted here.
            with _quiet("accelerate.big_modeling", "transformers.distributed.tensor_parallel"):
                on_disk = {"device_map": {"": "disk"}, "offload_folder": scratch}
                model = load_model(model_path, dtype, trust_remote_code, **on_disk)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        # Where the tensor of a parameter is: file, name in it, dtype wanted.
        self._places = _offload_index(model)
        if _settle_ties(model, self._places):
            log_own_head(model_path)
        # From here on layers come and go by this class alone.
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map
        super().__init__(model, find_family(model.config))
        # What takes their place while they are not here; tied ones are one.
        self._absent = model.state_dict()
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._prefetched: _Prefetch | None = None
        self._stream: torch.cuda.Stream | None = None
        # Called with every layer that is settled, while it is in memory.
        self.on_settled: Callable[[int, nn.Module, LayerMask], None] | None = None

    def close(self) -> None:
        """Let go of the disk."""
        self._reader.shutdown(cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def non_layer_names(self) -> list[str]:
        """Names of all that is stored outside of the layers, tied weights once."""
        tied = self.model.all_tied_weights_keys
        return [name for name in self._places if not name.startswith(f"{self.family.layers}.") and name not in tied]

    @contextmanager
    def non_layer_modules(self, device: torch.device = CPU) -> Iterator[None]:
        """While what is outside of the layers is in use, on ``device``."""
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
        """Layer ``index``, from disk, on ``device``."""
        ahead = self._prefetched
        if ahead is None or ahead[:2] != (index, device):
            ahead = self._prefetch(index, device)
        try:
            tensors = ahead[2].result()
        except torch.OutOfMemoryError:
            # The layer before had no memory to spare; it is done.
            torch.cuda.empty_cache()
            tensors = self._read_layer(index, device)
        self._prefetched = None
        if index + 1 < len(self.layers):
            self._prefetch(index + 1, device)
        layer = self.layers[index]
        self._assign(layer, tensors)
        # Buffers that are not stored (rotary frequencies of a layer's own) come along.
        for module in layer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        return layer

    def drop_prefetch(self) -> None:
        """Drop the layer that is read ahead."""
        if self._prefetched is not None and not self._prefetched[2].cancel():
            with suppress(torch.OutOfMemoryError):
                self._prefetched[2].result()
        self._prefetched = None

    def offload(self, index: int, mask: LayerMask | None = None) -> None:
        """Forget a layer's weights, after ``on_settled`` has seen them where ``mask`` is given."""
        layer = self.layers[index]
        if mask is not None and self.on_settled is not None:
            self.on_settled(index, layer, mask)
        prefix = self._prefix(index)
        self._assign(layer, {name: self._absent[prefix + name] for name in self._layer_names(index)})

    def sampled_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, mapped from disk: only what is looked at is read."""
        for name in sorted(self._places):
            place = self._places[name]
            with safe_open(place["safetensors_file"], "pt") as file:
                yield name, file.get_tensor(place["weight_name"])

    def read_non_layer_tensors(self) -> dict[str, Tensor]:
        """All that is stored outside of the layers, on the CPU."""
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
        """Tensors of the given names; to a GPU by a stream of its own, beside what that computes."""
        if device.type != "cuda":
            return {name: self._read_one(name) for name in names}
        # Always the same one: what is freed in a stream is not used again in others.
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            staged = {name: self._read_one(name).pin_memory() for name in names}
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in staged.items()}
            self._stream.synchronize()
        for tensor in tensors.values():
            # Its memory must not be given to another transfer while the computation still uses it.
            tensor.record_stream(torch.cuda.default_stream(device))
        return tensors

    def _read_one(self, name: str) -> Tensor:
        """By ``pread`` rather than by mapping the file, so that nothing else of it counts as this process's memory."""
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
    """Find where weights that the configuration ties are stored; either name may be the stored one.

    Returns:
        Whether both are, with different values: they are apart from then on, as in a model that is in memory.
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
    """Index, by accelerate, of the weights that were left on disk."""
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
