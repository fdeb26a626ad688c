"""Imports have one direction: a package imports only packages below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# From the bottom up; packages of one level do not import each other.
LEVELS = (
    ("models",),
    ("slim_utils.common", "slim_utils.pruning_config"),
    ("slim_utils.families", "slim_utils.text_source"),
    ("slim_utils.masks", "slim_utils.slim_dataset", "slim_utils.obs", "slim_utils.gguf_families"),
    ("slim_utils.pruned_config", "slim_utils.slimgpt"),
    ("slim_utils.params_remove",),
    ("slim_utils.profiling", "slim_utils.layerwise"),
    ("slim_utils.allocation",),
    ("slim_utils.output", "slim_utils.export", "slim_utils.report"),
    ("slim_utils.cli",),
    ("ppl_eval",),
    ("train_utils",),
    ("model_slimming", "model_finetune", "model_evaluate", "test_flops", "scripts"),
    ("benchmarks",),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}


def package_of(module: str) -> str | None:
    """Return the package in ``LEVELS`` that a module belongs to; ``None`` outside the suite."""
    parts = module.split(".")
    return next((package for package in (".".join(parts[:2]), parts[0]) if package in LEVEL), None)


def imports(path: Path) -> Iterator[str]:
    """Yield the modules, or names in packages, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_of_every_module_are_of_lower_levels():
    upward, packages = [], set()
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        package = package_of(".".join(relative.with_suffix("").parts))
        if package is None or relative.parts[0].startswith("."):
            continue
        packages.add(package)
        for module in imports(path):
            other = package_of(module)
            if other and other != package and LEVEL[other] >= LEVEL[package]:
                upward.append(f"{relative} imports {module}")
    assert not upward
    assert packages == set(LEVEL)


def test_imports_of_tests_are_only_in_tests():
    # Environments have names that start with a dot.
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "tests"))]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    assert not [path for path in files if any(module.split(".")[0] == "tests" for module in imports(path))]
