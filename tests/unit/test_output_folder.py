"""Locks, symbolic links and mount points of output folders."""

import os
import signal
import socket

import pytest

from slim_utils.errors import UserError
from slim_utils.output_folder import output_lock


def test_output_lock_of_a_live_process_is_named(lock_holder, tmp_path):
    process = lock_holder(tmp_path / "out")
    said = rf"^--save_dir .*out: process {process.pid} on {socket.gethostname()}, since 20.* writes it; let it finish"
    with pytest.raises(UserError, match=said), output_lock(tmp_path / "out", "--save_dir"):
        pass
    with output_lock(tmp_path / "other", "--save_dir"):
        pass


def test_output_lock_ends_with_a_killed_process(lock_holder, tmp_path):
    process = lock_holder(tmp_path / "out")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with output_lock(tmp_path / "out", "--save_dir"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert list(tmp_path.iterdir()) == []


def test_output_lock_is_the_first_process_alone(lock_holder, tmp_path, monkeypatch):
    lock_holder(tmp_path / "out")
    monkeypatch.setenv("RANK", "1")
    with output_lock(tmp_path / "out", "--save_dir"):
        pass


def test_output_lock_through_a_link_is_the_same(lock_holder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    lock_holder(tmp_path / "real")
    with pytest.raises(UserError, match="writes it"), output_lock(tmp_path / "link", "--save_dir"):
        pass


def test_output_lock_without_a_folder_locks_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with output_lock("", "--save_dir"):
        assert list(tmp_path.iterdir()) == []
