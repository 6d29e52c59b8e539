"""Typed configuration of a PIIP classifier; like `config`, it knows nothing of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .config import PIIPConfig
from .validation import check, check_choice

__all__ = ["ClassifierConfig"]

_HEADS = ("separate", "merged")
_POOLINGS = ("class_token", "first_patch", "average")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A pyramid with a classification head (paper sections III-C and IV-D).

    Args:
        pyramid: Branches and interactions; `merging` is None, since the head takes its place.
        num_classes: Number of classes; 0 gives the pooled features instead of class scores.
        head: "separate": every branch has a head of its own, as its pretrained network has, and the scores are
            averaged; "merged": one head on the merged branches (from-scratch training).
        pooling: What a separate head reads of its branch. "class_token": its class token; an interaction behind
            the last blocks could not reach it and is left out. "first_patch": the token of the top left patch, which
            the published classifiers read in place of the class token; their weights need it. "average": the mean of
            the patch tokens. A merged head always averages.
        num_groups: Groups of the group norms of a merged head; has to divide every branch's width.
        drop_rate: Dropout before the classifier.

    Raises:
        ConfigError: If the parts do not fit together; the message names the field, its value and the fix.
    """

    pyramid: PIIPConfig
    num_classes: int = 1000
    head: Literal["separate", "merged"] = "separate"
    pooling: Literal["class_token", "first_patch", "average"] = "class_token"
    num_groups: int = 32
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        check(self.num_classes >= 0, "ClassifierConfig.num_classes", self.num_classes, "0 or more")
        check(0 <= self.drop_rate < 1, "ClassifierConfig.drop_rate", self.drop_rate, "a rate in [0, 1)")
        check_choice("ClassifierConfig.head", self.head, _HEADS)
        check_choice("ClassifierConfig.pooling", self.pooling, _POOLINGS)
        check(
            self.pyramid.merging is None,
            "ClassifierConfig.pyramid.merging",
            self.pyramid.merging,
            "None: the head of a classifier takes the place of merging",
        )
        if self.head == "separate" and self.pooling == "class_token":
            without = [
                n for n, b in enumerate(self.pyramid.branches, 1) if not getattr(b.network, "class_token", False)
            ]
            check(
                not without,
                "ClassifierConfig.pooling",
                self.pooling,
                f"'average' or 'first_patch', since branches {without} have no class token (network.class_token)",
            )

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels: the largest image size of a branch."""
        return self.pyramid.branches[self.pyramid.largest_image - 1].image_size

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"pyramid": self.pyramid.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassifierConfig:
        """Inverse of `to_dict`. Unknown or missing fields raise ConfigError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        check(not unknown, cls.__name__, unknown, f"only the fields {', '.join(sorted(known))}")
        check("pyramid" in data, "ClassifierConfig.pyramid", None, "a PIIPConfig")
        return cls(**{**data, "pyramid": PIIPConfig.from_dict(data["pyramid"])})
