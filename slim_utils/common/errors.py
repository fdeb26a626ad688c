"""Exceptions that end a run with a one-line message, and notes attached to exceptions."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# The second is torch.save's only message about a truncated write.
_DISK_FULL_MESSAGES = ("No space left", "inline_container.cc")
# Of a GPU without room for what torch's allocator does not allocate: its context, and the handles of its libraries.
_GPU_FULL_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    # What the libraries mostly say where memory for a handle is missing.
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate",
)


class UserError(ValueError):
    """A wrong input or setting. The message is one line and names the flag to change."""


class RankError(UserError):
    """A wrong setting that shows in some processes of a run alone, each of which prints it."""


class ProcessLostError(Exception):
    """Another process of the run has exited or cannot be reached."""


def error_reason(error: BaseException) -> str:
    """Class and message of ``error`` on one line, unwrapping the cause of a datasets generation error."""
    while error.__cause__ is not None and "An error occurred while generating the dataset" in str(error):
        error = error.__cause__
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def annotate_errors(note: str) -> Iterator[None]:
    """Add ``note`` to any exception that leaves the block, e.g. what is already saved."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


@contextmanager
def row_errors(source: str, index: int) -> Iterator[None]:
    """Put ``source`` and row number ``index`` in front of a :class:`UserError` that leaves the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: row {index}: {error}") from error.__cause__


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or an exception in its cause or context chain, reports a full disk or an exceeded quota."""
    current: BaseException | None = error
    while current is not None:
        # Libraries wrap the OSError in their own classes.
        if getattr(current, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(current) for message in _DISK_FULL_MESSAGES):
            return True
        current = current.__cause__ or current.__context__
    return False


def is_gpu_full(error: BaseException) -> bool:
    """Whether ``error`` reports a full GPU without being torch's ``OutOfMemoryError``."""
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _GPU_FULL_MESSAGES)
