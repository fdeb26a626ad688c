"""Imports go one way: no room of the suite knows what stands above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# From the bottom up; rooms of one line do not know each other.
FLOORS = (
    ("models",),
    ("slim_utils.common", "slim_utils.pruning_config"),
    ("slim_utils.families", "slim_utils.text_source"),
    ("slim_utils.masks", "slim_utils.slim_dataset", "slim_utils.obs"),
    ("slim_utils.params_remove", "slim_utils.slimgpt"),
    ("slim_utils.profiling", "slim_utils.layerwise"),
    ("slim_utils.allocation",),
    ("slim_utils.output", "slim_utils.export", "slim_utils.report"),
    ("slim_utils.cli",),
    ("ppl_eval",),
    ("train_utils",),
    ("model_slimming", "model_finetune", "model_evaluate", "test_flops", "scripts"),
    ("benchmarks",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room that a module belongs to; ``None`` outside of the suite."""
    parts = module.split(".")
    return next((room for room in (".".join(parts[:2]), parts[0]) if room in FLOOR), None)


def imports(path: Path) -> Iterator[str]:
    """Modules, or names in packages, that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_of_every_module_go_down():
    upward, seen = [], set()
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        room = room_of(".".join(relative.with_suffix("").parts))
        if room is None or relative.parts[0].startswith("."):
            continue
        seen.add(room)
        for module in imports(path):
            other = room_of(module)
            if other and other != room and FLOOR[other] >= FLOOR[room]:
                upward.append(f"{relative} imports {module}")
    assert not upward
    assert seen == set(FLOOR)


def test_imports_of_tests_are_in_tests_alone():
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv")]
    assert not [path for path in files if any(module.split(".")[0] == "tests" for module in imports(path))]
