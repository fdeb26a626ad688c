"""Outputs appear whole or not at all: written beside their place and renamed, after a check that they can be."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from slim_utils.common.errors import UserError
from slim_utils.common.output_folder import (
    RUN_FILE,
    backup_paths,
    hidden_path,
    is_fixed,
    make_parent,
    output_entries,
    replace_entries,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_output(
    save_dir: Path, overwrite: bool, flag: str = "--save_dir", markers: tuple[str, ...] = (RUN_FILE,)
) -> None:
    """Check, before any long work, that the folder ``save_dir``, given as ``flag``, can be written.

    Only an earlier output, i.e. a folder with all files of ``markers``, may be overwritten.

    Raises:
        UserError: if the folder exists without ``overwrite``, is not an earlier output, or is not writable.
    """
    make_parent(save_dir, flag)
    if save_dir.exists():
        occupied = not save_dir.is_dir() or any(output_entries(save_dir))
        if occupied and not overwrite:
            raise UserError(f"{flag} {save_dir}: exists; choose another or pass --overwrite")
        for name in markers:
            if occupied and not (save_dir / name).is_file():
                raise UserError(f"{flag} {save_dir}: not the output of an earlier run (no {name}); not overwritten")
    staging_parent = hidden_path(save_dir, "partial-").parent
    if not os.access(staging_parent, os.W_OK):
        raise UserError(f"{flag} {save_dir}: {staging_parent} is not writable")


def check_output_file(path: Path, overwrite: bool, flag: str) -> None:
    """Check, before any long work, that the file ``path``, given as ``flag``, can be written.

    Raises:
        UserError: if the file exists without ``overwrite``, or its folder does not exist.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path}: exists; choose another or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: no such folder {path.absolute().parent}")


def warn_if_short_of_space(save_dir: Path, model: PreTrainedModel, copies: int) -> None:
    """Warn, before any long work, if ``copies`` checkpoints of the size of ``model`` may not fit on the disk."""
    needed = copies * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(hidden_path(save_dir, "partial-").parent).free
    if free < needed:
        gib = 1 << 30
        logger.warning("--save_dir %s: needs up to %.1f GiB, %.1f GiB are free", save_dir, needed / gib, free / gib)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` if the block succeeds, and is removed otherwise.

    A symbolic link is followed: its target is replaced. If the folder cannot be renamed, its entries are replaced.
    """
    target = target.resolve()
    if is_fixed(target):
        with _staging_folder(target) as partial:
            yield partial
            replace_entries(partial, target, output_entries(target))
        return
    with _staging_folder(target) as partial:
        old = partial.with_name(f"{partial.name}-old")
        try:
            yield partial
            # mkdtemp creates private folders; the output gets ordinary permissions.
            partial.chmod(0o777 & ~_umask())
            if target.exists():
                target.rename(old)
            partial.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``target``, a resolved path; removed afterwards if it still exists."""
    prefix = hidden_path(target, "partial-")
    partial = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
    try:
        yield partial
    finally:
        # An unfinished replacement is left to clear_leftovers.
        if not any(path.exists() for path in backup_paths(partial)):
            shutil.rmtree(partial, ignore_errors=True)


def scratch_folder(target: Path) -> Path:
    """Folder on the file system of ``target`` for temporary files of this process of a run."""
    return hidden_path(target, f"scratch-{os.environ.get('RANK', '0')}")


@contextmanager
def atomic_entries(target: Path) -> Iterator[Path]:
    """A temporary folder whose entries move into the folder ``target`` if the block succeeds.

    Every entry is moved atomically and replaces an entry of the same name; ``RUN_FILE`` is moved last.
    """
    target = target.resolve()
    with _staging_folder(target) as partial:
        yield partial
        namesakes = [target / entry.name for entry in partial.iterdir() if (target / entry.name).exists()]
        replace_entries(partial, target, namesakes)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it if the block succeeds, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as json to ``path`` atomically."""
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def save_tensors_atomic(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, synced to disk before it is renamed."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        # Sync before the rename.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
