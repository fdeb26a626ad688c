"""Another try with less memory where the device's is full."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from slim_utils.common.memory import empty_cache
from slim_utils.layerwise.offload import LayerHost
from slim_utils.layerwise.settings import WalkSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
