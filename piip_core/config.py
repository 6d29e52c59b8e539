"""Typed configuration of a PIIP model: what the branches, interactions and merging are, and nothing of how they run.

Branches are numbered as in the paper: Branch 1 has the most parameters and the smallest image, the last branch the
fewest parameters and the largest image. The order of `PIIPConfig.branches` is that order, and wherever a branch is
named by number, the number counts from 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

from .branches.base import FAMILIES, BranchConfig, NetworkConfig, freeze_sequences, is_sequence
from .errors import ConfigError, check, check_choice

ConfigT = TypeVar("ConfigT")
Pooling = Literal["class_token", "first_patch", "average"]


class _Described:
    """Configurations that are written to files."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, ready for JSON."""
        return _to_plain(self)

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Inverse of `to_dict`. Unknown or missing fields raise ConfigError."""
        return _build(cls, data)


def even_segments(depth: int, count: int) -> tuple[tuple[int, int], ...]:
    """Splits `depth` blocks into `count` consecutive segments of nearly equal length.

    Returns:
        `count` pairs of first and last block index, both inclusive. Where blocks are fewer than segments, a segment
        that runs no block has its last index one below its first.
    """
    bounds = [round(k * depth / count) for k in range(count + 1)] if count else []
    return tuple((a, b - 1) for a, b in itertools.pairwise(bounds))


@dataclass(frozen=True)
class UnitSpec:
    """One interaction unit between branches `low` < `high` (numbers from 1): which of the two receive features."""

    low: int
    high: int
    into_low: bool = True
    into_high: bool = True

    _PATTERN: ClassVar[re.Pattern[str]] = re.compile(r"(\d+)\s*(<->|->|<-)\s*(\d+)")

    @classmethod
    def parse(cls, text: object) -> UnitSpec:
        """Reads `"2<->3"` (both directions), `"3->2"` (features of Branch 3 into Branch 2) or `"2<-3"` (the same)."""
        match = cls._PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        parts = match.groups() if match else ()
        check(bool(parts), "InteractionConfig.units", text, "a unit such as '2<->3' or '3->2'")
        a, arrow, b = int(parts[0]), parts[1], int(parts[2])
        check(a != b, "InteractionConfig.units", text, "two different branches")
        into_b, into_a = arrow != "<-", arrow != "->"
        return cls(a, b, into_a, into_b) if a < b else cls(b, a, into_b, into_a)


def graph_presets(n: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Interaction graphs of the paper's Table XVII, each a cycle over consecutive interactions."""
    adjacent = [(i, i + 1) for i in range(n - 1, 0, -1)]  # from the high-resolution end, as published
    down = tuple(f"{b}->{a}" for a, b in adjacent)
    up = tuple(f"{a}->{b}" for a, b in reversed(adjacent))
    both = tuple(f"{a}<->{b}" for a, b in adjacent)
    closing = n > 2
    return {
        "adjacent": (both,),
        "alternating": (down, up),
        "cycle_down": (down + ((f"1->{n}",) if closing else ()),),
        "cycle_up": (up + ((f"{n}->1",) if closing else ()),),
        "bidirectional_cycle": (both + ((f"1<->{n}",) if closing else ()),),
    }


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """Cross-branch interactions (paper section III-B, equations 1 and 2).

    Args:
        num_interactions: How many, spread over the depth of the branches. 0 leaves the branches independent.
        units: Which branches exchange features, in which order. A preset name ("adjacent" is the published default;
            "alternating", "cycle_down", "cycle_up" and "bidirectional_cycle" are the other directions of Table XVII), a
            sequence of units such as `("2<->3", "1<->2")` used by every interaction, or a sequence of such sequences
            over which the interactions cycle.
        attention: "deformable" or "regular" cross-attention.
        num_heads: Heads of the cross-attention.
        num_points: Sampling points per head of deformable attention.
        value_ratio: Width of the values of deformable attention over the width of the query branch.
        projection: Project the other branch's features to the width of the query branch first.
        norm: "layernorm" (eps 1e-6) on queries, features and before the FFN, or "none".
        ffn: Add the convolutional FFN after the attention.
        ffn_ratio: Hidden width of the FFN over the width of the branch.
        drop_path_rate: Stochastic depth of the FFN; the attention has none.
    """

    num_interactions: int = 12
    units: str | tuple[str, ...] | tuple[tuple[str, ...], ...] = "adjacent"
    attention: Literal["deformable", "regular"] = "deformable"
    num_heads: int = 16
    num_points: int = 4
    value_ratio: float = 0.5
    projection: bool = True
    norm: Literal["layernorm", "none"] = "layernorm"
    ffn: bool = True
    ffn_ratio: float = 0.25
    drop_path_rate: float = 0.4

    def __post_init__(self) -> None:
        freeze_sequences(self, "units")
        check(self.num_interactions >= 0, "InteractionConfig.num_interactions", self.num_interactions, "0 or more")
        check_choice("InteractionConfig.attention", self.attention, ("deformable", "regular"))
        check_choice("InteractionConfig.norm", self.norm, ("layernorm", "none"))
        for field in ("num_heads", "num_points"):
            check(getattr(self, field) > 0, f"InteractionConfig.{field}", getattr(self, field), "a positive integer")

    def graph(self, interaction: int, num_branches: int) -> tuple[UnitSpec, ...]:
        """Units of one interaction, in the order they run.

        Raises:
            ConfigError: For an unknown preset, an unreadable unit, or a branch number that does not exist.
        """
        units = self.units
        if isinstance(units, str):
            presets = graph_presets(num_branches)
            check_choice("InteractionConfig.units", units, tuple(presets))
            units = presets[units]
        pattern = units if units and not isinstance(units[0], str) else (units,)
        specs = tuple(UnitSpec.parse(text) for text in pattern[interaction % len(pattern)])
        known = all(1 <= spec.low and spec.high <= num_branches for spec in specs)
        check(known, "InteractionConfig.units", units, f"branch numbers from 1 to {num_branches}")
        pairs = [(spec.low, spec.high) for spec in specs]
        check(len(set(pairs)) == len(pairs), "InteractionConfig.units", units, "each pair of branches at most once")
        return specs


@dataclass(frozen=True, kw_only=True)
class MergingConfig:
    """Branch merging and feature pyramid for dense prediction (paper section III-C, equations 3 and 4).

    Args:
        kind: "simple": one merged map (two 3x3 convolutions per branch), from which all levels are made; "regular":
            one more merged map after each interaction in `intermediate_after` (one convolution per branch but the
            first), each giving one level; "single": a single branch, nothing to merge.
        branches: Numbers of the branches that take part; None for all.
        intermediate_after: For "regular": the interactions (from 0) after which intermediate maps are merged, one
            fewer than `out_strides`.
        out_blocks: For "single": the block after which each level is taken; None makes all of them from the last.
        out_strides: Strides of the output maps in input pixels.
        pyramid_norm: Norm inside the four-fold upsampling: "group" (PIIP), "layer" (channel-wise, single-branch
            baselines).
        num_groups: Groups of all group norms.
    """

    kind: Literal["simple", "regular", "single"] = "simple"
    branches: tuple[int, ...] | None = None
    intermediate_after: tuple[int, ...] = ()
    out_blocks: tuple[int, ...] | None = None
    out_strides: tuple[int, ...] = (4, 8, 16, 32)
    pyramid_norm: Literal["group", "layer"] = "group"
    num_groups: int = 32

    def __post_init__(self) -> None:
        freeze_sequences(self, "branches", "intermediate_after", "out_blocks", "out_strides")
        check_choice("MergingConfig.kind", self.kind, ("simple", "regular", "single"))
        check_choice("MergingConfig.pyramid_norm", self.pyramid_norm, ("group", "layer"))
        levels, after, blocks = len(self.out_strides), self.intermediate_after, self.out_blocks
        count = levels - 1 if self.kind == "regular" else 0
        expected = f"{count} interactions for kind={self.kind!r} and {levels} out_strides"
        check(len(after) == count, "MergingConfig.intermediate_after", after, expected)
        fits = blocks is None or (self.kind == "single" and len(blocks) == levels)
        expected = f"None, or for kind='single' {levels} blocks, one per out_stride"
        check(fits, "MergingConfig.out_blocks", blocks, expected)


@dataclass(frozen=True, kw_only=True)
class PIIPConfig(_Described):
    """A whole PIIP backbone: branches from the largest model to the largest image, interactions, merging.

    `merging=None` leaves the branches unmerged (classification and multimodal heads bring their own merging).

    Raises:
        ConfigError: If the parts do not fit together; the message names the field, its value and the fix.
    """

    branches: tuple[BranchConfig, ...]
    interaction: InteractionConfig = InteractionConfig()
    merging: MergingConfig | None = MergingConfig()

    def __post_init__(self) -> None:
        freeze_sequences(self, "branches")
        check(len(self.branches) > 0, "PIIPConfig.branches", self.branches, "at least one branch")
        count = self.num_interactions
        expected = f"{count} segments, one per interaction (interaction.num_interactions={count})"
        for i, branch in enumerate(self.branches, 1):
            fits = branch.segments is None or len(branch.segments) == count
            check(fits, f"PIIPConfig.branches[{i}].segments", branch.segments, expected)
        for k in range(count):
            self.interaction.graph(k, len(self.branches))
        if self.merging is not None:
            self._check_merging(self.merging)

    def _check_merging(self, merging: MergingConfig) -> None:
        n, chosen = len(self.branches), self.merging_branches
        fits = bool(chosen) and set(chosen) <= set(range(1, n + 1)) and len(set(chosen)) == len(chosen)
        check(fits, "MergingConfig.branches", merging.branches, f"different numbers from 1 to {n}")
        expected = f"'simple' or 'regular' for {n} branches"
        check(merging.kind != "single" or n == 1, "MergingConfig.kind", merging.kind, expected)
        depth, count = self.branches[0].network.depth, self.num_interactions
        for block in merging.out_blocks or ():
            check(0 <= block < depth, "MergingConfig.out_blocks", block, f"blocks from 0 to {depth - 1}")
        for k in merging.intermediate_after:
            check(0 <= k < count, "MergingConfig.intermediate_after", k, f"interactions from 0 to {count - 1}")

    @property
    def num_interactions(self) -> int:
        """Number of interactions; a single branch has none."""
        return self.interaction.num_interactions if len(self.branches) > 1 else 0

    @property
    def largest_image(self) -> int:
        """Number (from 1) of the branch with the largest image, of several the last: input and merging have its grid.

        That is the last branch, except in a parameter-direct pyramid (paper Figure 1d).
        """
        return max(range(1, len(self.branches) + 1), key=lambda n: (self.branches[n - 1].image_size, n))

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels: the largest image size of a branch."""
        return self.branches[self.largest_image - 1].image_size

    @property
    def merging_branches(self) -> tuple[int, ...]:
        """Numbers (from 1) of the branches that take part in merging."""
        chosen = self.merging.branches if self.merging is not None else None
        return chosen if chosen is not None else tuple(range(1, len(self.branches) + 1))

    def segments(self, branch: int) -> tuple[tuple[int, int], ...]:
        """Segments of the branch with the given number (from 1); see `BranchConfig.segments`."""
        config = self.branches[branch - 1]
        if config.segments is not None:
            return config.segments
        return even_segments(config.network.depth, self.num_interactions)

    def dims_after(self, interaction: int | None) -> tuple[int, ...]:
        """Channels of each branch at an interaction, or with None at its end."""
        return tuple(b.network.dims[i] for b, i in zip(self.branches, self._blocks_before(interaction), strict=True))

    def strides_after(self, interaction: int | None) -> tuple[int, ...]:
        """Strides of each branch at an interaction, or with None at its end, in pixels of the branch's own image."""
        return tuple(b.network.strides[i] for b, i in zip(self.branches, self._blocks_before(interaction), strict=True))

    def _blocks_before(self, interaction: int | None) -> list[int]:
        """Index of the last block that each branch runs before an interaction; 0 if it runs none."""
        if interaction is None:
            return [branch.network.depth - 1 for branch in self.branches]
        return [max(self.segments(number)[interaction][1], 0) for number in range(1, len(self.branches) + 1)]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(_Described):
    """A pyramid with a classification head (paper sections III-C and IV-D).

    Args:
        pyramid: Branches and interactions; `merging` is None, since the head takes its place.
        num_classes: Number of classes; 0 gives the pooled features instead of class scores.
        head: "separate": every branch has a head of its own, as its pretrained network has, and the scores are
            averaged; "merged": one head on the merged branches (from-scratch training).
        pooling: What a separate head reads of its branch. "class_token": its class token; an interaction after the
            last blocks could not reach it and is left out. "first_patch": the token of the top left patch, which
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
    pooling: Pooling = "class_token"
    num_groups: int = 32
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        check(self.num_classes >= 0, "ClassifierConfig.num_classes", self.num_classes, "0 or more")
        check(0 <= self.drop_rate < 1, "ClassifierConfig.drop_rate", self.drop_rate, "a rate in [0, 1)")
        check_choice("ClassifierConfig.head", self.head, ("separate", "merged"))
        check_choice("ClassifierConfig.pooling", self.pooling, get_args(Pooling))
        merging, expected = self.pyramid.merging, "None: the head of a classifier takes the place of merging"
        check(merging is None, "ClassifierConfig.pyramid.merging", merging, expected)
        if self.head == "separate" and self.pooling == "class_token":
            without = [n for n, branch in enumerate(self.pyramid.branches, 1) if not branch.network.class_token]
            expected = f"'average' or 'first_patch', since branches {without} have no class token"
            check(not without, "ClassifierConfig.pooling", self.pooling, expected)

    @property
    def image_size(self) -> int:
        """As of the pyramid."""
        return self.pyramid.image_size


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"family": value.family, **fields} if isinstance(value, NetworkConfig) else fields
    return [_to_plain(v) for v in value] if is_sequence(value) else value


def _build(cls: type, data: Mapping[str, Any]) -> Any:
    data = dict(data)
    if cls is NetworkConfig:
        family = data.pop("family", None)
        check_choice("network.family", family, tuple(FAMILIES))
        cls = FAMILIES[family].config
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    check(not unknown, cls.__name__, unknown, f"only the fields {', '.join(sorted(known))}")
    for name, part in _PARTS.get(cls, {}).items():
        value = data.get(name)
        if is_sequence(value):
            data[name] = [_build(part, each) for each in value]
        elif value is not None:
            data[name] = _build(part, value)
    try:
        return cls(**data)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{cls.__name__}: {error}") from None


_PARTS: dict[type, dict[str, type]] = {
    ClassifierConfig: {"pyramid": PIIPConfig},
    PIIPConfig: {"branches": BranchConfig, "interaction": InteractionConfig, "merging": MergingConfig},
    BranchConfig: {"network": NetworkConfig},
}
"""What the fields that hold other configurations are made of."""
