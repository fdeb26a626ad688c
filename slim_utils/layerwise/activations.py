"""Activations after the last finished layer, on disk, so that a resumed run does not run the finished layers again."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slim_utils.common.atomic_output import save_tensors_atomic

logger = logging.getLogger(__name__)

GIB = 2**30
# Without a limit: share of the free disk space that the file may take, and share of the run that writing may take.
FREE_DISK_SHARE, TIME_SHARE = 0.1, 0.05


class ActivationStore:
    """One file, replaced after a layer where that costs little next to the run.

    Args:
        path: the file.
        limit: GiB that it may take; 0 keeps nothing, ``None`` takes what the disk has room for.
    """

    def __init__(self, path: Path, limit: float | None = None) -> None:
        self.path, self._limit = path, limit
        self._write_seconds, self._written_at = 0.0, time.perf_counter()

    def save(self, index: int, hidden: list[Tensor]) -> None:
        """Keep the outputs of layer ``index``, one tensor (samples, seqlen, hidden) a window length.

        A disk that is full is logged, and ends the keeping, not the run.
        """
        start = time.perf_counter()
        due = self._write_seconds <= TIME_SHARE * (start - self._written_at)
        if not due or sum(tensor.nbytes for tensor in hidden) > self._room():
            return
        tensors = {str(number): tensor for number, tensor in enumerate(hidden)}
        try:
            save_tensors_atomic(tensors, self.path, {"layer": str(index)})
        except (OSError, SafetensorError) as error:
            logger.warning("activations for --resume are not kept (%s); finished layers are", error)
            self._limit = 0
        self._written_at = time.perf_counter()
        self._write_seconds = self._written_at - start

    def load(
        self, device: torch.device, is_usable: Callable[[int], bool] = lambda index: True
    ) -> tuple[int, list[Tensor]] | None:
        """Read the stored activations.

        Args:
            device: to read them to.
            is_usable: whether those after a layer are of use, by its index.

        Returns:
            The index of the layer and its outputs, ``None`` where there are none of use.
        """
        if self._limit == 0 or not self.path.exists():
            return None
        # A mapped file would keep its disk space when it is replaced.
        backend = {"backend": "pread"} if device.type == "cpu" else {}
        try:
            with safe_open(self.path, "pt", device=str(device), **backend) as file:
                index = int(file.metadata()["layer"])
                return (index, [file.get_tensor(name) for name in sorted(file.keys())]) if is_usable(index) else None
        except SafetensorError:
            logger.warning("--resume: %s cannot be read; finished layers are run again", self.path)
            return None

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _room(self) -> float:
        """Bytes that the file may take."""
        if self._limit is not None:
            return self._limit * GIB
        return FREE_DISK_SHARE * shutil.disk_usage(self.path.parent).free
