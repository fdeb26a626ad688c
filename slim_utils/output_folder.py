"""Where an output folder is, where the hidden files of a run that writes it are, and which process writes it.

A symbolic link stands for its target. Hidden files (the lock, the unfinished run, staged output) are beside the folder,
or in it where it cannot be renamed: a mount point, such as a container's volume, or a folder whose parent is read-only.
"""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from slim_utils.errors import UserError

logger = logging.getLogger(__name__)

# Kinds of hidden files, and what a file system has at its root by itself.
_HIDDEN_KINDS = ("lock", "unfinished", "scratch-", "partial-")
_NOT_OUTPUT = ("lost+found",)


def is_fixed(target: Path) -> bool:
    """Whether the folder ``target`` has to stay where it is, so that its entries are replaced instead of itself."""
    if not target.is_dir():
        return False
    # A bind mount from the same disk is none by its device number.
    mounted = os.path.ismount(target) or str(target) in {part.mountpoint for part in psutil.disk_partitions(all=True)}
    return mounted or not os.access(target.parent, os.W_OK)


def hidden_path(target: Path, kind: str) -> Path:
    """Path of the hidden file or folder ``kind`` of a run that writes ``target``, on the same file system."""
    target = target.resolve()
    return target / f".{kind}" if is_fixed(target) else target.with_name(f".{target.name}.{kind}")


def output_entries(target: Path) -> list[Path]:
    """Entries of the folder ``target``, without hidden files of runs."""
    hidden = tuple(f".{kind}" for kind in _HIDDEN_KINDS) if is_fixed(target.resolve()) else ()
    return [
        entry
        for entry in target.iterdir()
        if entry.name not in _NOT_OUTPUT and not (hidden and entry.name.startswith(hidden))
    ]


@contextmanager
def output_lock(save_dir: str | Path | None, flag: str) -> Iterator[None]:
    """Keep other processes from writing ``save_dir``, given as ``flag``, while the block runs.

    The lock is the operating system's: it ends with the process, whatever ends that. Of several processes of one run
    the first holds it; ``None`` or an empty path locks nothing.

    Raises:
        UserError: if a live process writes there, with its id, its host, and since when.
    """
    with nullcontext() if not save_dir or os.environ.get("RANK", "0") != "0" else _held(Path(save_dir), flag):
        yield


@contextmanager
def _held(save_dir: Path, flag: str) -> Iterator[None]:
    make_parent(save_dir, flag)
    path = hidden_path(save_dir, "lock")
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{flag} {save_dir}: {_holder(path)} writes it; let it finish or choose another") from None
    except (OSError, NotImplementedError) as error:
        # A folder that cannot be written is refused where outputs are checked.
        if getattr(error, "errno", errno.ENOSYS) not in (errno.EACCES, errno.EPERM, errno.EROFS):
            logger.warning("%s %s: no locks there (%s); start no second run on it", flag, save_dir, error)
        yield
        return
    try:
        since = datetime.now().isoformat(" ", "seconds")
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        # Before it is let go: whoever opened it already finds it gone, and makes another.
        path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    return "another process"


def make_parent(save_dir: Path, flag: str) -> None:
    """Make the folder that ``save_dir``, given as ``flag``, is to be in.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        save_dir.resolve().parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # pathlib's word for a loop of symbolic links is a RuntimeError.
        raise UserError(f"{flag} {save_dir}: {getattr(error, 'strerror', None) or error}") from error
