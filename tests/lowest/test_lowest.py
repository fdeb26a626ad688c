"""The oldest versions that ``pyproject.toml`` allows, in an environment of their own: ``pytest -m lowest``."""

import hashlib
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-lowest"
# What the tests below need besides the suite.
TOOLS = ("pytest", "pytest-timeout")
TESTS = [
    "tests/unit/common",
    "tests/unit/export",
    "tests/unit/layerwise/test_layer_forward.py",
    "tests/unit/layerwise/test_pruner.py",
    "tests/unit/models",
    "tests/unit/ppl_eval",
    "tests/unit/test_params_remove.py",
    "tests/unit/test_slim_dataset.py",
    "tests/unit/test_slimgpt.py",
    "tests/unit/test_text_source.py",
    "tests/unit/train_utils",
]
# What the libraries of that age do otherwise: sdpa attention leaves out Gemma 2's soft cap, and the rotary embedding is
# a product that counts among the MACs. The formatter is not among them.
DESELECTED = [
    "tests/unit/layerwise/test_pruner.py::test_same_model_as_the_plain_walk[gemma2-eager]",
    "tests/unit/test_params_remove.py::test_sizes_agree_with_closed_formulas",
    "tests/unit/models/test_slim_models.py::test_shipped_code_of_every_row_is_formatted",
]


def oldest(text: str) -> str:
    """A pin of the lowest version in the range ``text``."""
    requirement = Requirement(text)
    (lower,) = (part for part in requirement.specifier if part.operator == ">=")
    return f"{requirement.name}=={lower.version}"


def oldest_pins() -> list[str]:
    """Pins of the dependencies, of the extras that the tests need, and of the tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tools = [text for text in extras["dev"] if Requirement(text).name in TOOLS]
    return [oldest(text) for text in (*project["dependencies"], *extras["gguf"], *extras["report"], *tools)]


def install(pins: list[str]) -> Path:
    """The interpreter of an environment with ``pins``, made anew when they have changed."""
    stamp = FOLDER / f".installed-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:16]}"
    python = FOLDER / "bin" / "python"
    if not stamp.exists():
        venv.create(FOLDER, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *pins], check=True)
        stamp.touch()
    return python


@pytest.mark.lowest
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the oldest versions are those for Python 3.11")
def test_unit_tests_oldest_versions_pass():
    python = install(oldest_pins())
    deselected = [word for name in DESELECTED for word in ("--deselect", name)]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *deselected]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
