"""Rename rules between two naming schemes, each usable in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["PARTS", "Change", "Rule", "RuleTable", "rename_parts"]

PARTS = 3  # queries, keys and values


class Change(Enum):
    """What besides the name differs between our tensor and the published one."""

    NONE = "nothing"
    POSITION_SLOT = (
        "entry 0 of the published position table is for a class token that the network does not have, or gives no "
        "position: dropped here, zeros on the way back"
    )
    POSITION_TABLE = "the published position table has no batch axis"
    POSITION_TABLE_SLOT = (
        "the published position table has no batch axis, and entry 0 is for a class token that the network does not "
        "have: dropped here, zeros on the way back"
    )
    POINTWISE_KERNEL = "a linear there is a convolution of one position here"
    CLASS_TOKEN = "the published class token has no batch and sequence axes"
    SCALAR = "one vector here is a scalar per branch there"

    def to_ours(self, tensor: Tensor) -> Tensor:
        """Makes our tensor of the published one."""
        match self:
            case Change.POSITION_SLOT:
                return tensor[:, 1:].clone()
            case Change.POSITION_TABLE:
                return tensor[None]
            case Change.POSITION_TABLE_SLOT:
                return tensor[None, 1:].clone()
            case Change.POINTWISE_KERNEL:
                return tensor[..., None, None]
            case Change.CLASS_TOKEN:
                return tensor[None, None]
            case Change.SCALAR:
                return tensor.reshape(1)
        return tensor

    def to_published(self, tensor: Tensor) -> Tensor:
        """Undoes `to_ours`; what it dropped comes back as zeros."""
        match self:
            case Change.POSITION_SLOT:
                return torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
            case Change.POSITION_TABLE:
                return tensor[0]
            case Change.POSITION_TABLE_SLOT:
                return torch.cat((torch.zeros_like(tensor[0, :1]), tensor[0]))
            case Change.POINTWISE_KERNEL:
                return tensor[..., 0, 0]
            case Change.CLASS_TOKEN:
                return tensor[0, 0]
            case Change.SCALAR:
                return tensor.reshape(())
        return tensor


@dataclass(frozen=True)
class Rule:
    """One correspondence of names. `*` stands for one component between dots, the same text on both sides.

    Attributes:
        ours: Our name.
        published: The published name.
        change: What besides the name differs.
        part: Which of the equal parts of our tensor, along its first axis, the published one is (queries, keys and
            values of one linear); None if it is all of it.
        parts: How many there are.
    """

    ours: str
    published: str
    change: Change = Change.NONE
    part: int | None = None
    parts: int = PARTS

    def __post_init__(self) -> None:
        if self.ours.count("*") != self.published.count("*"):
            raise ValueError(f"rule {self.ours!r} <-> {self.published!r}: expected the same number of * on both sides")

    def prefixed(self, ours: str, published: str) -> Rule:
        """The same rule below a prefix on either side."""
        return replace(self, ours=ours + self.ours, published=published + self.published)

    def take(self, tensor: Tensor) -> Tensor:
        """The published tensor, from ours."""
        return self.change.to_published(tensor if self.part is None else tensor.chunk(self.parts)[self.part])

    @cached_property
    def _ours(self) -> re.Pattern[str]:
        return _pattern(self.ours)

    @cached_property
    def _published(self) -> re.Pattern[str]:
        return _pattern(self.published)

    def to_ours(self, published: str) -> str | None:
        """Our name for a published one, or None if the rule is about other names."""
        return _translate(self._published, self.ours, published)

    def to_published(self, ours: str) -> str | None:
        """The published name for one of ours, or None if the rule is about other names."""
        return _translate(self._ours, self.published, ours)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(r"([^.]+)".join(re.escape(part) for part in template.split("*")))


def _translate(pattern: re.Pattern[str], template: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    head, *tails = template.split("*")
    return head + "".join(value + tail for value, tail in zip(match.groups(), tails, strict=True))


class RuleTable:
    """An ordered set of rules; the first that knows a name decides."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def to_ours(self, published: str) -> tuple[str, Rule] | None:
        """Our name for a published one and the rule that gave it, or None."""
        return next(((name, rule) for rule in self.rules if (name := rule.to_ours(published)) is not None), None)

    def to_published(self, ours: str) -> tuple[str, Rule] | None:
        """The published name for one of ours and the rule that gave it, or None; of several parts the first."""
        return next(((name, rule) for rule in self.rules if (name := rule.to_published(ours)) is not None), None)

    def all_published(self, ours: str) -> list[tuple[str, Rule]]:
        """As `to_published`, with all parts of a tensor that is published in parts; empty for an unknown name."""
        found = ((name, rule) for rule in self.rules if (name := rule.to_published(ours)) is not None)
        return [(name, rule) for i, (name, rule) in enumerate(found) if i == 0 or rule.part is not None]


def rename_parts(*names: str | tuple[str, str]) -> tuple[Rule, ...]:
    """Rules from names that are equal on both sides and (ours, published) pairs of those that are not."""
    return tuple(Rule(*((name, name) if isinstance(name, str) else name)) for name in names)
