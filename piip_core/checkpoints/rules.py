"""Correspondences of names between our models and published ones, each written once and used in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

PARTS = 3  # queries, keys and values


@dataclass(frozen=True)
class Change:
    """What besides the name differs between our tensor and the published one.

    Attributes:
        note: What it is, for the account.
        to_ours: Makes our tensor of the published one.
        to_published: Undoes that; what it dropped comes back as zeros.
    """

    note: str
    to_ours: Callable[[Tensor], Tensor]
    to_published: Callable[[Tensor], Tensor]


SAME = Change("", lambda tensor: tensor, lambda tensor: tensor)
POSITION_SLOT = Change(
    "entry 0 of the published position table is for a class token that the network does not have, or gives no "
    "position: dropped here, zeros on the way back",
    lambda tensor: tensor[:, 1:].clone(),
    lambda tensor: torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1),
)
POSITION_TABLE = Change(
    "the published position table has no batch axis", lambda tensor: tensor[None], lambda tensor: tensor[0]
)
POSITION_TABLE_SLOT = Change(
    f"{POSITION_TABLE.note}, and {POSITION_SLOT.note}",
    lambda tensor: POSITION_SLOT.to_ours(tensor[None]),
    lambda tensor: POSITION_SLOT.to_published(tensor)[0],
)
POINTWISE_KERNEL = Change(
    "a linear there is a convolution of one position here",
    lambda tensor: tensor[..., None, None],
    lambda tensor: tensor[..., 0, 0],
)
CLASS_TOKEN = Change(
    "the published class token has no batch and sequence axes",
    lambda tensor: tensor[None, None],
    lambda tensor: tensor[0, 0],
)
SCALAR = Change(
    "one vector here is a scalar per branch there", lambda tensor: tensor.reshape(1), lambda tensor: tensor.reshape(())
)


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
    change: Change = SAME
    part: int | None = None
    parts: int = PARTS

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

    def to_published(self, ours: str) -> list[tuple[str, Rule]]:
        """The published name for one of ours and the rule that gave it; several of a tensor that is published in parts.

        Empty for an unknown name.
        """
        found = ((name, rule) for rule in self.rules if (name := rule.to_published(ours)) is not None)
        return [(name, rule) for i, (name, rule) in enumerate(found) if i == 0 or rule.part is not None]


def rename_parts(*names: str | tuple[str, str]) -> tuple[Rule, ...]:
    """Rules from names that are equal on both sides and (ours, published) pairs of those that are not."""
    return tuple(Rule(*((name, name) if isinstance(name, str) else name)) for name in names)
