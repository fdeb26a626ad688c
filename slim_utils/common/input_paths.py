"""Inputs that an output would replace, found before any work."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from slim_utils.common.errors import UserError


def check_inputs_outside(output: Path, flag: str, inputs: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Make sure that no input is the output itself or lies inside it, where the finished run would replace it.

    Args:
        output: folder or file to write, given as ``flag``.
        flag: its flag.
        inputs: paths by the flag they were given with; hub names and ``None`` are not looked at.

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
    """Whether ``path`` is ``folder`` or in it, by the way it is written or where its symbolic links lead."""
    target = folder.resolve()
    return any(
        parent.resolve() == target
        for form in (Path(os.path.abspath(path)), path.resolve())
        for parent in (form, *form.parents)
    )


def eval_files(specs: Iterable[str]) -> list[str]:
    """The files among evaluation texts given as ``NAME``, ``FILE`` or ``NAME=FILE``."""
    forms = [(spec, spec.partition("=")[2]) for spec in specs]
    return [form for pair in forms for form in pair if form and Path(form).is_file()]
