"""Retries with less memory after an out-of-memory error of the device."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from slim_utils.common.memory import empty_cache, full_gpu_as_out_of_memory
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.settings import PruningSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


def warn_of_full_memory(where: str, settings: PruningSettings) -> None:
    """Log that ``where`` ran out of device memory, and the settings of the retry."""
    message = "%s: out of device memory; retrying with %d samples per forward, activations on %s"
    logger.warning(message, where, settings.batch_samples, settings.cache_dev)


def retry_with_less_memory(
    work: Callable[[PruningSettings], T], settings: PruningSettings, samples: Tensor, host: ResidentModel, where: str
) -> T:
    """Run ``work``, and retry it with reduced settings when the device is out of memory.

    Args:
        work: can be restarted at any time; it leaves nothing on the device but layers of ``host``.
        settings: settings of the first try.
        samples: (count, seqlen) token ids that it works on.
        host: storage of the model.
        where: name of the work in the log.

    Raises:
        OutOfMemoryError: if the settings cannot be reduced further.
    """
    while True:
        try:
            with full_gpu_as_out_of_memory():
                return work(settings)
        except torch.OutOfMemoryError:
            reduced = settings.with_less_memory(samples)
            if reduced is None:
                raise
        # Outside of the handler, whose traceback keeps the tensors of the failed work alive.
        settings = reduced
        host.drop_prefetch()
        for index in range(len(host.layers)):
            host.offload(index)
        empty_cache(settings.device)
        warn_of_full_memory(where, settings)
