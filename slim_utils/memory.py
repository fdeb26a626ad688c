"""Memory of the device: how much is free, and another try with less of it where it is full."""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from slim_utils.layer_host import LayerHost
from slim_utils.walk_settings import WalkSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CONTROL_GROUPS, _OWN_CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, use, and the use by files that are only cached, in either version of control groups.
_CONTROL_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the GPU, or available on the host and in the control groups of this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_free_in_control_groups()])


def _free_in_control_groups() -> Iterator[int]:
    """Bytes that this process's control groups (of a container, a batch job) leave, each; none where nothing limits."""
    try:
        groups = _OWN_CONTROL_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in groups:
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        top = _CONTROL_GROUPS if version == 2 else _CONTROL_GROUPS / "memory"
        group = top / path.strip("/")
        # Those above limit too. In a container the path may be the host's, and only the top be there.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):
                    yield _free_in_control_group(folder, version)


def _free_in_control_group(folder: Path, version: int) -> int:
    limit, used, cached = _CONTROL_GROUP_FILES[version]
    # Without a limit it is "max", which is no number.
    free = int((folder / limit).read_text()) - int((folder / used).read_text())
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    # Cached files count as used, and make room where it is needed.
    return max(0, free + int(counts.get(cached, 0)))


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
