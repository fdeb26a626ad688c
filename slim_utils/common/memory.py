"""Memory of a device: what is free within the limits of this process, and errors where it is full."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from slim_utils.common.errors import is_gpu_full

_CONTROL_GROUPS, _OWN_CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, usage, and usage by the page cache, by version of control groups.
_CONTROL_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: torch.device) -> int:
    """Free bytes on the GPU, or on the host within the control groups of this process.

    Memory that torch's allocator keeps for its next tensors counts as free.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *_free_in_control_groups()])


def _free_in_control_groups() -> Iterator[int]:
    """Free bytes in each limited control group of this process (e.g. of a container or a batch job)."""
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
        # Parent groups limit too. In a container, the path may be that of the host, and only the top exists.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):
                    yield _free_in_control_group(folder, version)


def _free_in_control_group(folder: Path, version: int) -> int:
    limit, used, cached = _CONTROL_GROUP_FILES[version]
    # Without a limit, the file contains "max", which is not a number (ValueError).
    free = int((folder / limit).read_text()) - int((folder / used).read_text())
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    # The page cache counts as used, but is reclaimable.
    return max(0, free + int(counts.get(cached, 0)))


def empty_cache(device: torch.device) -> None:
    """Release unused cached memory of the GPU's allocator."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def full_gpu_as_out_of_memory() -> Iterator[None]:
    """Context in which every error of a full GPU is an ``OutOfMemoryError``, also where torch's allocator has no part.

    Handles of cuBLAS and cuSOLVER, for example, are allocated at their first use, and torch does not release its cached
    memory for them.
    """
    try:
        yield
    except RuntimeError as error:
        if is_gpu_full(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
