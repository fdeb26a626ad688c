"""The exceptions that end a run with one line, and notes that go with any exception."""

from collections.abc import Iterator
from contextlib import contextmanager


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
