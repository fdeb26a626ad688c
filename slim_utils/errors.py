"""The exceptions that end a run with one line."""


class UserError(ValueError):
    """A wrong input or setting. The message is one line and names the flag to change."""


class ProcessLostError(Exception):
    """Another process of the run has ended, or cannot be reached."""
