"""Output folders: hidden files of a run, the lock, and the replacement of earlier entries.

A symbolic link is resolved to its target. Hidden files (the lock, the unfinished run, staged output) are beside the
folder, or inside it if it cannot be renamed: a mount point, such as a container's volume, or a folder with a read-only
parent.
"""

import errno
import glob
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from slim_utils.common.errors import UserError

logger = logging.getLogger(__name__)

# Kinds of hidden files, and entries that a file system has at its root.
_HIDDEN_KINDS = ("lock", "unfinished", "scratch-", "partial-")
_NOT_OUTPUT = ("lost+found",)
# The record of a run, written last: its presence marks a complete output.
RUN_FILE = "run.json"


def is_fixed(target: Path) -> bool:
    """Whether the folder ``target`` cannot be renamed, so that its entries are replaced instead."""
    if not target.is_dir():
        return False
    # os.path.ismount misses bind mounts from the same disk, which have the same device number.
    mounted = os.path.ismount(target) or str(target) in {part.mountpoint for part in psutil.disk_partitions(all=True)}
    return mounted or not os.access(target.parent, os.W_OK)


def hidden_path(target: Path, kind: str) -> Path:
    """Path of the hidden file or folder ``kind`` of a run that writes ``target``; on the same file system."""
    target = target.resolve()
    return target / f".{kind}" if is_fixed(target) else target.with_name(f".{target.name}.{kind}")


def output_entries(target: Path) -> list[Path]:
    """Entries of the folder ``target``, except hidden files of runs."""
    hidden = tuple(f".{kind}" for kind in _HIDDEN_KINDS) if is_fixed(target.resolve()) else ()
    return [
        entry
        for entry in target.iterdir()
        if entry.name not in _NOT_OUTPUT and not (hidden and entry.name.startswith(hidden))
    ]


@contextmanager
def output_lock(save_dir: str | Path | None, flag: str) -> Iterator[None]:
    """Hold the lock of the output folder ``save_dir``, given as ``flag``, while the block runs.

    The lock belongs to the operating system and is released when the process ends. Rank 0 holds it for all processes
    of a run; ``None`` or an empty path locks nothing. Staged files of a killed process are removed.

    Raises:
        UserError: if another live process holds the lock, with its id, host and start time.
    """
    with nullcontext() if not save_dir or os.environ.get("RANK", "0") != "0" else _hold_lock(Path(save_dir), flag):
        yield


@contextmanager
def _hold_lock(save_dir: Path, flag: str) -> Iterator[None]:
    make_parent(save_dir, flag)
    path = hidden_path(save_dir, "lock")
    lock, reason = FileLock(path, fallback_to_soft=False), None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{flag} {save_dir}: {_holder(path)} is writing it; wait, or choose another folder") from None
    except (OSError, NotImplementedError) as error:
        reason = error
    if reason is not None:
        # A folder that is not writable is refused by check_output.
        if getattr(reason, "errno", errno.ENOSYS) not in (errno.EACCES, errno.EPERM, errno.EROFS):
            logger.warning("%s %s: cannot be locked (%s); do not start a second run on it", flag, save_dir, reason)
        yield
        return
    try:
        since = datetime.now().isoformat(" ", "seconds")
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        clear_leftovers(save_dir)
        yield
    finally:
        # Removed before the release: a process that has the file open finds it removed, and creates a new one.
        path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    return "another process"


def make_parent(save_dir: Path, flag: str) -> None:
    """Create the parent folder of ``save_dir``, given as ``flag``, or the target of a dangling link.

    Raises:
        UserError: if the folder cannot be created.
    """
    try:
        target = save_dir.resolve()
        (target if save_dir.is_symlink() else target.parent).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # pathlib raises RuntimeError for a loop of symbolic links.
        raise UserError(f"{flag} {save_dir}: {getattr(error, 'strerror', None) or error}") from error


def replace_entries(staged: Path, target: Path, replaced: Iterable[Path]) -> None:
    """Move the entries of ``staged`` into the folder ``target``, replacing its entries ``replaced``.

    ``RUN_FILE`` is removed first and moved last: if it exists, all other entries are of the same run. After a kill,
    :func:`clear_leftovers` completes the replacement or rolls it back.
    """
    backup, complete_backup = backup_paths(staged)
    backup.mkdir()
    try:
        for entry in sorted(replaced, key=lambda path: path.name != RUN_FILE):
            entry.rename(backup / entry.name)
        # The commit point: before it, the earlier entries are restored; after it, the staged entries are moved.
        backup.rename(complete_backup)
    finally:
        finish_replacement(staged, target)


def clear_leftovers(target: Path) -> None:
    """Remove the staged files that a killed process left for ``target``.

    An unfinished replacement is rolled back or, if its backup is complete, completed.
    """
    target = target.resolve()
    prefix = hidden_path(target, "partial-")

    def leftovers(ending: str) -> list[Path]:
        return sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}*{ending}"))

    for old in leftovers("-old"):
        if not target.exists():
            old.rename(target)
    for ending in ("-aside", "-replaced"):
        for backup in leftovers(ending):
            finish_replacement(backup.with_name(backup.name.removesuffix(ending)), target)
    for leftover in leftovers(""):
        shutil.rmtree(leftover, ignore_errors=True)


def finish_replacement(staged: Path, target: Path) -> None:
    """Complete or roll back an interrupted :func:`replace_entries` of ``staged``, if there is one."""
    backup, complete_backup = backup_paths(staged)
    for source, folder in ((backup, backup), (staged, complete_backup)):
        if folder.is_dir():
            for entry in sorted(source.iterdir(), key=lambda path: path.name == RUN_FILE):
                entry.rename(target / entry.name)
            shutil.rmtree(folder)


def backup_paths(staged: Path) -> tuple[Path, Path]:
    """Backup folders of the entries that ``staged`` replaces: while they are being moved, and once all are."""
    return staged.with_name(f"{staged.name}-aside"), staged.with_name(f"{staged.name}-replaced")
