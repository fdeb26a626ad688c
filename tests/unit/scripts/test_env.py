"""``scripts/env.sh``: the Python version of environments, and paths of the caller's folder."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# A fake Python that reports a version and creates an empty environment.
PYTHON = """#!/bin/sh
case $1 in
    -c) exec {real} -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2" ;;
    -m) mkdir -p "$3/bin" && printf '#!/bin/sh\\n' >"$3/bin/python" && chmod +x "$3/bin/python" ;;
esac
"""


def fake_python(path: Path, version: tuple[int, ...]) -> Path:
    """A command that claims to be Python ``version``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(real=sys.executable, version=version))
    path.chmod(0o755)
    return path


def make(folder: Path, call: str = "make_venv requirements.txt", **variables: str) -> subprocess.CompletedProcess:
    """Source ``env.sh`` in ``folder`` and call one of its functions."""
    (folder / "requirements.txt").touch()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | variables
    command = ["bash", "-c", f'set -euo pipefail; source "{ROOT}/scripts/env.sh"; {call}']
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("call", ["make_venv requirements.txt", "make_engine_venv engine requirements.txt"])
def test_make_venv_with_an_older_python_says_which_is_needed(call, named, tmp_path):
    old = fake_python(tmp_path / "bin" / "python3", (3, 10, 14))
    path = f"{old.parent}:{os.environ['PATH']}"
    process = make(tmp_path, call, **({"PYTHON": str(old)} if named else {"PATH": path}))
    assert process.returncode == 2
    name = old if named else "python3"
    assert process.stderr == f"{name} is not Python 3.11 or newer; set PYTHON to a newer one\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bin", "requirements.txt"]


def test_make_venv_with_an_environment_of_an_older_python_says_to_remove_it(tmp_path):
    fake_python(tmp_path / ".venv" / "bin" / "python", (3, 10, 14))
    process = make(tmp_path, PYTHON=sys.executable)
    assert process.returncode == 2
    assert (
        process.stderr == ".venv/bin/python is not Python 3.11 or newer; remove .venv, and set PYTHON to a newer one\n"
    )


def test_make_venv_without_a_python_is_one_line(tmp_path):
    process = make(tmp_path, PYTHON="/none/python3")
    assert process.returncode == 2
    assert process.stderr == "/none/python3 is not Python 3.11 or newer; set PYTHON to a newer one\n"


def test_make_venv_with_the_oldest_python_makes_it(tmp_path):
    process = make(tmp_path, PYTHON=str(fake_python(tmp_path / "python3", (3, 11, 0))))
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / ".venv").glob(".installed-*-requirements.txt"))


def test_pyproject_names_the_same_python_for_project_and_ruff():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert content["project"]["name"] == "slimgpt"
    assert content["project"]["requires-python"] == ">=3.11"
    assert content["tool"]["ruff"]["target-version"] == "py311"


def test_local_texts_are_absolute_files_with_their_weights_and_names(tmp_path):
    folder = tmp_path / "my texts"
    folder.mkdir()
    for path in (folder / "a.txt", folder / "b:1", tmp_path / "c.txt"):
        path.touch()
    call = f'local_texts "c4:0.7 a.txt a.txt:0.3 b:1 wikitext2 {tmp_path}/c.txt:2 none.txt"'
    process = make(folder, call)
    assert process.returncode == 0, process.stderr
    texts = ["c4:0.7", f"{folder}/a.txt", f"{folder}/a.txt:0.3", f"{folder}/b:1"]
    assert process.stdout.splitlines() == [*texts, "wikitext2", f"{tmp_path}/c.txt:2", "none.txt"]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_scripts_keep_to_what_bash_3_and_bsd_tools_have(script):
    """As macOS has them: no ``realpath -m``, in-place ``sed`` or what bash 4 added."""
    text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
    newer = r"realpath -|mapfile|readarray|declare -A|sed -i|grep -P|\$\{\w+(,,|\^\^|@Q)|&>>"
    assert not re.search(newer, text)


def test_absolute_path_is_in_the_callers_folder_and_need_not_exist(tmp_path):
    process = make(tmp_path, "absolute_path out/new; absolute_path /out/new")
    assert process.stdout == f"{tmp_path}/out/new\n/out/new\n"
