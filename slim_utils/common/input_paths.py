"""Checks, before any work, that no input lies inside an output."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from slim_utils.common.errors import UserError


def check_inputs_outside(output: Path, flag: str, inputs: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Check that no input is the output or lies inside it, where the finished run would replace it.

    Args:
        output: folder or file to write.
        flag: flag of the output.
        inputs: paths by the flag that they were given with; hub names and ``None`` are skipped.

    Raises:
        UserError: naming both flags.
    """
    for input_flag, paths in inputs.items():
        for path in paths:
            if path is not None and Path(path).exists() and is_inside(Path(path), output):
                raise UserError(
                    f"{input_flag} {path}: inside {flag} {output}, which the run replaces; choose another {flag}"
                )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or inside it, either as written or with symbolic links resolved."""
    target = folder.resolve()
    return any(
        parent.resolve() == target
        for form in (Path(os.path.abspath(path)), path.resolve())
        for parent in (form, *form.parents)
    )


def eval_files(specs: Iterable[str]) -> list[str]:
    """Existing files among evaluation texts given as ``NAME``, ``FILE`` or ``NAME=FILE``."""
    forms = [(spec, spec.partition("=")[2]) for spec in specs]
    return [form for pair in forms for form in pair if form and Path(form).is_file()]
