"""The exceptions that end a run with one line, and notes that go with any exception."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A wrong input or setting. The message is one line and names the flag to change."""


class ProcessLostError(Exception):
    """Another process of the run has ended, or cannot be reached."""


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Add ``note`` to whatever exception leaves the block: what holds in spite of it."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise
