"""Memory of the device: how much is free, in the limits of this process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

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
