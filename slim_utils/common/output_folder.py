"""Where an output folder is, where the hidden files of a run that writes it are, and which process writes it.

A symbolic link stands for its target. Hidden files (the lock, the unfinished run, staged output) are beside the folder,
or in it where it cannot be renamed: a mount point, such as a container's volume, or a folder whose parent is read-only.
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

# Kinds of hidden files, and what a file system has at its root by itself.
_HIDDEN_KINDS = ("lock", "unfinished", "scratch-", "partial-")
_NOT_OUTPUT = ("lost+found",)
# The record of a run: where it is in a folder, the output is whole.
RUN_FILE = "run.json"


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
    the first holds it; ``None`` or an empty path locks nothing. What a killed process has staged there is cleared.

    Raises:
        UserError: if a live process writes there, with its id, its host, and since when.
    """
    with nullcontext() if not save_dir or os.environ.get("RANK", "0") != "0" else _held(Path(save_dir), flag):
        yield


@contextmanager
def _held(save_dir: Path, flag: str) -> Iterator[None]:
    make_parent(save_dir, flag)
    path = hidden_path(save_dir, "lock")
    lock, reason = FileLock(path, fallback_to_soft=False), None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{flag} {save_dir}: {_holder(path)} writes it; let it finish or choose another") from None
    except (OSError, NotImplementedError) as error:
        reason = error
    if reason is not None:
        # A folder that cannot be written is refused where outputs are checked.
        if getattr(reason, "errno", errno.ENOSYS) not in (errno.EACCES, errno.EPERM, errno.EROFS):
            logger.warning("%s %s: no locks there (%s); start no second run on it", flag, save_dir, reason)
        yield
        return
    try:
        since = datetime.now().isoformat(" ", "seconds")
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        clear_leftovers(save_dir)
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
    """Make the folder that ``save_dir``, given as ``flag``, is to be in, and the target of a link to nothing.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        target = save_dir.resolve()
        (target if save_dir.is_symlink() else target.parent).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # pathlib's word for a loop of symbolic links is a RuntimeError.
        raise UserError(f"{flag} {save_dir}: {getattr(error, 'strerror', None) or error}") from error


def replace_entries(staged: Path, target: Path, replaced: Iterable[Path]) -> None:
    """Move the entries of ``staged`` into the folder ``target``, in place of ``replaced``, which are entries of it.

    ``RUN_FILE`` is the first to go and the last to come: where it is, all others are of the same run. What a process
    leaves that is killed on the way, :func:`clear_leftovers` completes or undoes.
    """
    aside, old = put_aside(staged)
    aside.mkdir()
    try:
        for entry in sorted(replaced, key=lambda path: path.name != RUN_FILE):
            entry.rename(aside / entry.name)
        # From here on the staged entries are moved, whatever happens; until then the earlier ones come back.
        aside.rename(old)
    finally:
        settle_entries(staged, target)


def clear_leftovers(target: Path) -> None:
    """Remove what was staged for ``target`` when a process was killed.

    What it had put aside comes back, or, once all was put aside, what was staged gets in place.
    """
    target = target.resolve()
    prefix = hidden_path(target, "partial-")

    def found(ending: str) -> list[Path]:
        return sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}*{ending}"))

    for old in found("-old"):
        if not target.exists():
            old.rename(target)
    for ending in ("-aside", "-replaced"):
        for begun in found(ending):
            settle_entries(begun.with_name(begun.name.removesuffix(ending)), target)
    for leftover in found(""):
        shutil.rmtree(leftover, ignore_errors=True)


def settle_entries(staged: Path, target: Path) -> None:
    """Complete, or undo, a :func:`replace_entries` of ``staged`` that was cut off; nothing where there was none."""
    aside, old = put_aside(staged)
    for source, done in ((aside, aside), (staged, old)):
        if done.is_dir():
            for entry in sorted(source.iterdir(), key=lambda path: path.name == RUN_FILE):
                entry.rename(target / entry.name)
            shutil.rmtree(done)


def put_aside(staged: Path) -> tuple[Path, Path]:
    """Where earlier entries are while they are put aside for those of ``staged``, and once all of them are."""
    return staged.with_name(f"{staged.name}-aside"), staged.with_name(f"{staged.name}-replaced")
