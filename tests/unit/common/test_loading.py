"""Atomic output folders, devices and errors of loading."""

import errno
import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from slim_utils.common import loading as model_io
from slim_utils.common.atomic_output import atomic_folder, check_output, write_text_atomic
from slim_utils.common.errors import UserError, is_disk_full
from slim_utils.common.loading import choose_device, choose_local_device, load_config, peak_memory_mib


def test_atomic_folder_that_succeeds_appears_complete(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("earlier", [False, True])
def test_atomic_folder_that_fails_leaves_no_partial_output(tmp_path, error, earlier):
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


def test_atomic_folder_replacing_a_run_removes_its_files(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with atomic_folder(target) as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_check_output_of_an_existing_folder_needs_overwrite_and_a_run(tmp_path):
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


def test_check_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--save_dir"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_write_text_atomic_that_fails_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(TypeError):
        write_text_atomic(path, None)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "new"


def test_is_disk_full_recognises_its_messages():
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "x"))


def test_choose_device_of_an_unknown_name_is_refused():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"--cache_dev {name}"):
            choose_device(name, "--cache_dev")


def test_choose_local_device_of_a_rank_is_the_gpu_of_its_number(monkeypatch):
    assert choose_local_device("auto") == choose_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    devices = {name: str(choose_local_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")}
    assert devices == {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    # All ranks raise it, whether or not they have a GPU.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--device auto: 3 processes on a machine with 2 CUDA devices"):
        choose_local_device("auto")


def test_choose_local_device_of_a_rank_that_sees_one_gpu_is_that_gpu(monkeypatch):
    """As of a batch system that gives every process a GPU, and sets no number of local processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_local_device("auto") == torch.device("cuda:0")


def test_peak_memory_mib_without_the_resource_module_uses_psutil(monkeypatch):
    """As on Windows."""
    assert peak_memory_mib(torch.device("cpu"))["host"] > 1
    monkeypatch.setattr(model_io, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3 << 20))
    assert peak_memory_mib(torch.device("cpu")) == {"host": 3.0}


def test_load_config_of_a_missing_or_broken_checkpoint_is_one_line(tmp_path):
    (tmp_path / "broken").mkdir()
    for path in (tmp_path / "none", tmp_path / "broken"):
        with pytest.raises(UserError, match=r"^model ") as error:
            load_config(str(path), trust_remote_code=False)
        assert "\n" not in str(error.value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
