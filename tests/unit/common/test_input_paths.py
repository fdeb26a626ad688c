"""Inputs inside an output are found, however their paths are written."""

from pathlib import Path

import pytest

from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import check_inputs_outside, eval_files


@pytest.fixture
def folders(tmp_path) -> Path:
    """An output with a file in it, another folder, and symbolic links both ways."""
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "out" / "deep" / "text").touch()
    (tmp_path / "other" / "text").touch()
    (tmp_path / "into").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "away").symlink_to(tmp_path / "other")
    return tmp_path


@pytest.mark.parametrize(
    "path", ["out", "out/deep/text", "into/deep", "out/away/text", "other/../out/deep", "out/away"]
)
@pytest.mark.parametrize("output", ["out", "into", "other/../out"])
def test_check_inputs_outside_with_an_input_inside_is_refused(folders, path, output):
    with pytest.raises(UserError, match=f"--data {folders / path}: inside --to .*; choose another --to"):
        check_inputs_outside(folders / output, "--to", {"--data": [None, folders / path]})


@pytest.mark.parametrize("path", ["other", "other/text", "out/../other/text", "nowhere", "out/nowhere"])
def test_check_inputs_outside_with_other_inputs_passes(folders, path):
    check_inputs_outside(folders / "out", "--to", {"--data": [folders / path, "someone/model", None]})


def test_check_inputs_outside_with_relative_paths_is_refused(folders, monkeypatch):
    monkeypatch.chdir(folders / "out")
    with pytest.raises(UserError, match=r"MODEL \.: inside OUT"):
        check_inputs_outside(Path("../out"), "OUT", {"MODEL": ["."]})


def test_eval_files_of_every_spelling_are_found(folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "a=b").touch()
    specs = ["wikitext2", "other/text", "mine=other/text", "a=b", "ptb=nowhere"]
    assert eval_files(specs) == ["other/text", "other/text", "a=b"]
