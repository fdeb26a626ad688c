"""The exceptions that end a run with one line, and notes that go with any exception."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# The second is all that torch.save says of a write that fell short.
_DISK_FULL_MESSAGES = ("No space left", "inline_container.cc")


class UserError(ValueError):
    """A wrong input or setting. The message is one line and names the flag to change."""


class ProcessLostError(Exception):
    """Another process of the run has ended, or cannot be reached."""


def error_reason(error: BaseException) -> str:
    """Class and whole message of ``error`` on one line; of the error that a library wrapped, where it hides that."""
    while error.__cause__ is not None and "An error occurred while generating the dataset" in str(error):
        error = error.__cause__
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Add ``note`` to whatever exception leaves the block: what holds in spite of it."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or one it was raised in the handling of, says that no space (or quota) is left."""
    current: BaseException | None = error
    while current is not None:
        # Libraries wrap it in classes of their own.
        if getattr(current, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(current) for message in _DISK_FULL_MESSAGES):
            return True
        current = current.__cause__ or current.__context__
    return False
