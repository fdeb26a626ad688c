"""Output folders that appear whole or not at all, devices and errors of loading."""

import errno
import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from slim_utils.common import loading as model_io
from slim_utils.common.errors import UserError, is_disk_full
from slim_utils.common.loading import (
    atomic_folder,
    check_output,
    choose_device,
    load_config,
    peak_memory_mib,
    write_text_atomic,
)


def test_atomic_folder_appears_whole(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_half_written_is_left(tmp_path, error, earlier):
    target = tmp_path / "out"
    if earlier:
        target.mkdir()
        (target / "run.json").write_text("old")
    with pytest.raises(type(error)), atomic_folder(target) as partial:
        (partial / "file").write_text("x")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])
    if earlier:
        assert (target / "run.json").read_text() == "old"


def test_replacing_an_earlier_run_leaves_nothing_of_it(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with atomic_folder(target) as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_existing_output_is_never_overwritten_silently(tmp_path):
    target = tmp_path / "out"
    check_output(target, overwrite=False)
    target.mkdir()
    check_output(target, overwrite=False)
    (target / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists; choose another or pass --overwrite"):
        check_output(target, overwrite=False)
    with pytest.raises(UserError, match=r"not the output of an earlier run \(no run\.json\)"):
        check_output(target, overwrite=True)
    (target / "run.json").write_text("{}")
    check_output(target, overwrite=True)


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--save_dir"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(TypeError):
        write_text_atomic(path, None)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "new"


def test_disk_full_is_recognised():
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "x"))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"--cache_dev {name}"):
            choose_device(name, "--cache_dev")


def test_peak_memory_mib_where_there_is_no_resource_module(monkeypatch):
    """On Windows."""
    assert peak_memory_mib(torch.device("cpu"))["host"] > 1
    monkeypatch.setattr(model_io, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3 << 20))
    assert peak_memory_mib(torch.device("cpu")) == {"host": 3.0}


def test_missing_and_broken_checkpoints_are_one_line(tmp_path):
    (tmp_path / "broken").mkdir()
    for path in (tmp_path / "none", tmp_path / "broken"):
        with pytest.raises(UserError, match=r"^model ") as error:
            load_config(str(path), trust_remote_code=False)
        assert "\n" not in str(error.value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
