"""The record of versions, commit and hardware."""

import os
import subprocess

import pytest
import torch

import slim_utils
from slim_utils.common import environment as environment_module
from slim_utils.common.environment import commit, environment


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, in the place of the suite's."""
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag")
    monkeypatch.setattr(environment_module, "_ROOT", tmp_path)
    commit.cache_clear()
    yield tmp_path
    commit.cache_clear()


def test_commit_clean_checkout_short_hash(checkout):
    assert commit() == git(checkout, "rev-parse", "--short", "HEAD")


def test_commit_changed_file_dirty(checkout):
    (checkout / "file").write_text("b")
    assert commit() == git(checkout, "rev-parse", "--short", "HEAD") + "-dirty"


def test_commit_installed_in_another_checkout_unknown(checkout, monkeypatch):
    (checkout / "site-packages").mkdir()
    monkeypatch.setattr(environment_module, "_ROOT", checkout / "site-packages")
    assert commit() == "unknown"


def test_commit_without_git_unknown(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert commit() == "unknown"


def test_environment_version_and_commit():
    record = environment(torch.device("cpu"))
    assert record["versions"]["slimgpt"] == slim_utils.__version__
    assert record["commit"] == commit()


def test_gpus_are_hidden_from_tests_that_need_none():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
