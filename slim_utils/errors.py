"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A wrong input or setting. The message is one line and names the flag to change."""
