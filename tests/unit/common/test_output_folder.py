"""Locks, symbolic links and mount points of output folders."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from slim_utils.common import output_folder
from slim_utils.common.atomic_output import atomic_entries, atomic_folder, check_output
from slim_utils.common.errors import UserError
from slim_utils.common.output_folder import clear_leftovers, is_fixed, output_lock

REMOVE = shutil.rmtree


def test_output_lock_of_a_live_process_is_named(lock_holder, tmp_path):
    process = lock_holder(tmp_path / "out")
    message = rf"^--save_dir .*out: process {process.pid} on {socket.gethostname()}, since 20.* is writing it; wait"
    with pytest.raises(UserError, match=message), output_lock(tmp_path / "out", "--save_dir"):
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


def test_output_lock_is_held_by_rank_0_only(lock_holder, tmp_path, monkeypatch):
    lock_holder(tmp_path / "out")
    monkeypatch.setenv("RANK", "1")
    with output_lock(tmp_path / "out", "--save_dir"):
        pass


def test_output_lock_through_a_link_is_that_of_its_target(lock_holder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    lock_holder(tmp_path / "real")
    with pytest.raises(UserError, match="is writing it"), output_lock(tmp_path / "link", "--save_dir"):
        pass


def test_output_lock_without_a_folder_locks_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with output_lock("", "--save_dir"):
        assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "weights").write_text(text)
    (folder / "run.json").write_text(text)


def test_atomic_folder_of_a_link_replaces_its_target(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to("disk/runs")
    for text in ("first", "second"):
        check_output(link, overwrite=True)
        with atomic_folder(link) as partial:
            assert partial.parent == tmp_path / "disk"
            write(partial, text, text)
        assert link.is_symlink()
        assert contents(tmp_path / "disk" / "runs") == {f"{text}/weights": text, "run.json": text}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["runs"]


def test_check_output_of_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match=r"^--save_dir .*out: "):
        check_output(tmp_path / "out", overwrite=False)


def test_is_fixed_only_for_the_mount_point_itself(mount_point):
    (mount_point / "out").mkdir()
    assert is_fixed(mount_point) and not is_fixed(mount_point / "out")
    assert not is_fixed(mount_point.parent) and not is_fixed(mount_point / "none")


def test_atomic_folder_of_a_mount_point_replaces_its_entries(mount_point):
    (mount_point / "lost+found").mkdir()
    for text in ("first", "second"):
        check_output(mount_point, overwrite=text == "second")
        with output_lock(mount_point, "--save_dir"), atomic_folder(mount_point) as partial:
            write(partial, text, text)
            assert "run.json" not in contents(mount_point) or text == "second"
        assert contents(mount_point) == {f"{text}/weights": text, "run.json": text}
        assert sorted(path.name for path in mount_point.iterdir()) == sorted([text, "lost+found", "run.json"])
    with pytest.raises(UserError, match="exists; choose another or pass --overwrite"):
        check_output(mount_point, overwrite=False)
    assert [path.name for path in mount_point.parent.iterdir()] == ["volume"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_atomic_folder_of_a_mount_point_that_fails_keeps_the_earlier_run(mount_point, error):
    write(mount_point, "old", "old")
    with pytest.raises(type(error)), atomic_folder(mount_point) as partial:
        write(partial, "new", "new")
        raise error
    assert contents(mount_point) == {"old/weights": "old", "run.json": "old"}
    assert sorted(path.name for path in mount_point.iterdir()) == ["old", "run.json"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("moves", range(8))
def test_clear_leftovers_after_a_kill_between_moves_gives_one_run(tmp_path, monkeypatch, whole, moves):
    """On a mount point. Entries of the earlier run that the new one lacks are kept by ``atomic_entries`` only."""
    target = tmp_path / "out"
    target.mkdir()
    write(target, "old", "old")
    (target / "both").write_text("old")
    monkeypatch.setattr(output_folder, "is_fixed", lambda path: path == target)
    monkeypatch.setattr("slim_utils.common.atomic_output.is_fixed", lambda path: path == target)
    rename, done, killed = Path.rename, [], []

    def limited(path, new):
        if len(done) >= moves:
            killed.append(path)
            raise SystemExit("killed")
        done.append(path)
        return rename(path, new)

    with monkeypatch.context() as patched:
        # A killed process does nothing more.
        patched.setattr(Path, "rename", limited)
        patched.setattr(shutil, "rmtree", lambda path, **flags: killed or REMOVE(path, **flags))
        try:
            with (atomic_folder if whole else atomic_entries)(target) as partial:
                write(partial, "new", "new")
                (partial / "both").write_text("new")
        except SystemExit:
            pass
    clear_leftovers(target)
    old = {"old/weights": "old", "both": "old", "run.json": "old"}
    new = {"new/weights": "new", "both": "new", "run.json": "new"} | ({} if whole else {"old/weights": "old"})
    assert contents(target) in (old, new)
    assert not list(target.glob(".*"))
    if moves == 0:
        assert contents(target) == old
    if not killed:
        assert contents(target) == new


def test_atomic_entries_of_a_mount_point_keeps_other_entries(mount_point):
    write(mount_point, "old", "old")
    with atomic_entries(mount_point) as partial:
        write(partial, "new", "new")
    assert contents(mount_point) == {"old/weights": "old", "new/weights": "new", "run.json": "new"}
