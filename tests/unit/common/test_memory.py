"""Free memory of the host, within the control groups of this process."""

import psutil
import pytest
import torch

from slim_utils.common import memory
from slim_utils.common.memory import free_memory

CPU = torch.device("cpu")
GIB = 1 << 30
NAMES = {
    1: ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "5:cpu,memory:"),
    2: ("", "memory.max", "memory.current", "inactive_file", "0::"),
}


@pytest.fixture
def control_group(tmp_path, monkeypatch):
    """Function that creates a control group and makes it that of this process (or the path ``process_group``)."""
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CONTROL_GROUPS", tmp_path / "own")

    def make(version, path, limit, used, cached=0, process_group=None):
        top, *files, line = NAMES[version]
        folder = tmp_path / top / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(files[:2], (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{files[2]} {cached}\n")
        (tmp_path / "own").write_text(f"9:freezer:/\n{line}{process_group or path}\n")

    return make


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_in_a_control_group_is_its_limit_minus_usage(version, control_group):
    control_group(version, "/jobs/mine", GIB // 2, GIB // 4, GIB // 8)
    assert free_memory(CPU) == GIB // 4 + GIB // 8
    control_group(version, "/jobs/mine", GIB // 2, GIB)
    assert free_memory(CPU) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_limited_by_parent_groups(version, control_group):
    control_group(version, "/jobs", GIB // 16, 0)
    control_group(version, "/jobs/mine", GIB // 2, 0)
    assert free_memory(CPU) == GIB // 16


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_in_a_container_uses_the_top_group(version, control_group):
    control_group(version, "/", GIB // 2, 0, process_group="/docker/0123")
    assert free_memory(CPU) == GIB // 2


@pytest.mark.parametrize(("version", "limit"), [(1, (1 << 63) - 4096), (2, "max")])
def test_free_memory_without_a_limit_is_that_of_the_machine(version, limit, control_group, monkeypatch):
    control_group(version, "/", limit, 100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12345})())
    assert free_memory(CPU) == 12345


def test_free_memory_without_control_groups_is_that_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_OWN_CONTROL_GROUPS", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12345})())
    assert free_memory(CPU) == 12345


def test_free_memory_of_a_gpu_includes_what_the_allocator_keeps(monkeypatch):
    """The driver counts it as used, but the next tensors take it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GIB)
    assert free_memory(torch.device("cuda")) == 51 * GIB
