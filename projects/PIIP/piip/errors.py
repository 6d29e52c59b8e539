"""The errors that a user can cause and cure."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in what was given. The message says which and what was expected; tools print it without a traceback."""
