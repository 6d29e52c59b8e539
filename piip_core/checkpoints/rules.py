"""Correspondences of names between our models and published ones, each written once and used in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

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
    """One correspondence of names. `*` stands for text without dots, the same on both sides.

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


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(r"([^.]+)".join(re.escape(part) for part in template.split("*")))


def _translate(template: str, into: str, name: str) -> str | None:
    """The name in the form of another template; None if it does not fit the first."""
    match = _pattern(template).fullmatch(name)
    return None if match is None else into.replace("*", "{}").format(*match.groups())


class RuleTable:
    """An ordered set of rules; the first that knows a name decides."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def to_ours(self, published: str) -> tuple[str, Rule] | None:
        """Our name for a published one and the rule that gave it, or None."""
        found = ((_translate(rule.published, rule.ours, published), rule) for rule in self.rules)
        return next(((name, rule) for name, rule in found if name is not None), None)

    def to_published(self, ours: str) -> list[tuple[str, Rule]]:
        """The published name for one of ours and the rule that gave it; several of a tensor that is published in parts.

        Empty for an unknown name.
        """
        found = ((_translate(rule.ours, rule.published, ours), rule) for rule in self.rules)
        known = [(name, rule) for name, rule in found if name is not None]
        return known[:1] + [(name, rule) for name, rule in known[1:] if rule.part is not None]


def rename_parts(*names: str | tuple[str, str]) -> tuple[Rule, ...]:
    """Rules from names that are equal on both sides and (ours, published) pairs of those that are not."""
    return tuple(Rule(*((name, name) if isinstance(name, str) else name)) for name in names)
