"""Checks of configuration values, with errors that name field, value and fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ConfigError

__all__ = ["check", "check_choice", "freeze_sequences", "is_sequence", "to_tuples"]


def check(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: expected {expected}")


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """Raises ConfigError unless the value is one of the choices."""
    check(value in choices, field, value, "one of " + ", ".join(repr(c) for c in choices))


def is_sequence(value: object) -> bool:
    """Whether the value is a list, tuple or the like, and not a string."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def to_tuples(value: Any) -> Any:
    """Turns any nesting of sequences (lists, OmegaConf's ListConfig) into tuples."""
    return tuple(to_tuples(v) for v in value) if is_sequence(value) else value


def freeze_sequences(config: Any, *fields: str) -> None:
    """Turns the named fields of a frozen dataclass into tuples, so that equal configurations compare equal."""
    for field in fields:
        object.__setattr__(config, field, to_tuples(getattr(config, field)))
