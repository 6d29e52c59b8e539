"""The errors that a user can cause and cure, and checks of configuration values that raise them."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what was given. The message says which and what was expected; tools print it without a traceback."""


class ConfigError(UserError):
    """A configuration has a value that cannot work; the message names field, value and fix."""


class CheckpointError(UserError):
    """A file cannot be read or does not fit the model; the message names the file, the keys and the fix."""


class SaveError(UserError):
    """Something could not be written; the message says what, why and what helps."""


class OutputFolderError(UserError):
    """The folder of a run cannot be used as it is; the message names the fix."""


class NotSupportedYet(NotImplementedError):  # noqa: N818  (says what it is)
    """The published model uses something this version cannot express; `feature` names it."""

    def __init__(self, feature: str) -> None:
        super().__init__(f"not supported yet: {feature}")
        self.feature = feature


def check(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError, which names field, value and what was expected, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: expected {expected}")


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """Raises ConfigError unless the value is one of the choices."""
    check(value in choices, field, value, "one of " + ", ".join(repr(c) for c in choices))


def listed(items: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first items for a message, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
