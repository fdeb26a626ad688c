"""Memory of the device: how much is free, and another try with less of it where it is full."""

import logging
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from slim_utils.layer_host import LayerHost
from slim_utils.walk_settings import WalkSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the GPU, or available on the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def empty_cache(device: torch.device) -> None:
    """Give memory that the allocator keeps, but nothing uses, back to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warn_of_full_memory(where: str, settings: WalkSettings) -> None:
    """Say that ``where`` memory was full, and with which settings it goes on."""
    message = "%s: the device's memory is full; going on with %d samples at once, activations on %s"
    logger.warning(message, where, settings.batch_samples, settings.cache_dev)


def with_less_memory(
    work: Callable[[WalkSettings], T], settings: WalkSettings, samples: Tensor, host: LayerHost, where: str
) -> T:
    """The result of ``work``; where the device's memory is full, that of another try with less at once.

    Args:
        work: may be begun again at any time; it leaves nothing on the device but layers of ``host``.
        settings: of the first try.
        samples: (count, seqlen) token ids that it works on.
        host: of the model.
        where: what it is, for the log.

    Raises:
        OutOfMemoryError: if there is nothing left to give up.
    """
    while True:
        try:
            return work(settings)
        except torch.OutOfMemoryError:
            relieved = settings.relieved(samples)
            if relieved is None:
                raise
        # Out of the handler, which holds on to all that the work had in memory.
        settings = relieved
        host.give_way()
        for index in range(len(host.layers)):
            host.release(index)
        empty_cache(settings.device)
        warn_of_full_memory(where, settings)
