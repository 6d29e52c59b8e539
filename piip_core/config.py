"""Typed configuration of a PIIP model: what the branches, interactions and merging are, and nothing of how they run.

Branches are numbered as in the paper: Branch 1 has the most parameters and the smallest image, the last branch the
fewest parameters and the largest image. The order of `PIIPConfig.branches` is that order, and wherever a branch is
named by number, the number counts from 1.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError
from .interaction_graph import UnitSpec, graph_presets
from .networks import NetworkConfig
from .validation import check, check_choice, freeze_sequences, is_sequence

__all__ = [
    "BranchConfig",
    "InteractionConfig",
    "MergingConfig",
    "PIIPConfig",
    "even_segments",
]


def even_segments(depth: int, count: int) -> tuple[tuple[int, int], ...]:
    """Splits `depth` blocks into `count` consecutive segments of nearly equal length.

    Returns:
        `count` pairs of first and last block index, both inclusive. Where blocks are fewer than segments, a segment
        that runs no block has its last index one below its first.
    """
    bounds = [round(k * depth / count) for k in range(count + 1)] if count else []
    return tuple((a, b - 1) for a, b in itertools.pairwise(bounds))


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One branch of the pyramid.

    Args:
        network: Architecture of the branch.
        image_size: Image side in pixels the branch is meant for. Only ratios between branches matter: branch i sees
            the input resized by `image_size_i / largest image_size`.
        segments: First and last block (inclusive, from 0) that run before each interaction. None spreads the blocks
            evenly. In order and without gaps; blocks behind the last segment run at the end.
        window_size: Side of the attention windows in tokens; None for global attention; a sequence gives one entry
            per block.
        window_padding: Where token maps that are no multiple of the window are padded with zeros. "before_qkv" is
            what every published model does: padded keys and values equal the qkv bias and take part in the softmax.
            "after_qkv" gives zero keys and values (the public implementation without flash attention).
        drop_path_rate: Stochastic depth rate.
        drop_path_schedule: "constant" over the blocks (published DeiT branches) or "linear" from 0.
        pretrained: Weights to start from: `timm:NAME` (downloaded by timm), or the path of a file in a published
            format (.pth or .safetensors). None for random weights. Read by
            `piip_core.checkpoints.load_pretrained`, not by the constructors of modules.
    """

    network: NetworkConfig
    image_size: int
    segments: tuple[tuple[int, int], ...] | None = None
    window_size: int | tuple[int | None, ...] | None = None
    window_padding: Literal["before_qkv", "after_qkv"] = "before_qkv"
    drop_path_rate: float = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    pretrained: str | None = None

    def __post_init__(self) -> None:
        check(
            isinstance(self.network, NetworkConfig),
            "BranchConfig.network",
            self.network,
            f"one of {', '.join(c.__name__ for c in NetworkConfig.families.values())}",
        )
        freeze_sequences(self, "segments", "window_size")
        check(self.image_size > 0, "BranchConfig.image_size", self.image_size, "a positive number of pixels")
        check(0 <= self.drop_path_rate < 1, "BranchConfig.drop_path_rate", self.drop_path_rate, "a rate in [0, 1)")
        check_choice("BranchConfig.window_padding", self.window_padding, ("before_qkv", "after_qkv"))
        check_choice("BranchConfig.drop_path_schedule", self.drop_path_schedule, ("constant", "linear"))
        self._check_windows()
        if self.segments is not None:
            self._check_segments(self.segments)

    def _check_windows(self) -> None:
        windows, depth = self.window_sizes, self.network.depth
        check(len(windows) == depth, "BranchConfig.window_size", windows, f"{depth} entries, one per block")
        for w in windows:
            check(w is None or w > 0, "BranchConfig.window_size", w, "a positive window side, or None for global")
        check(
            not self.network.no_windows or all(w is None for w in windows),
            "BranchConfig.window_size",
            self.window_size,
            f"None: {self.network.no_windows}",
        )
        if getattr(self.network, "class_token", False):
            check(
                all(w is None for w in windows),
                "BranchConfig.window_size",
                self.window_size,
                "None for a network with class_token=True (a class token belongs to no window)",
            )

    def _check_segments(self, segments: tuple[tuple[int, int], ...]) -> None:
        expected = f"consecutive [first, last] pairs of blocks 0 to {self.network.depth - 1}"
        start = 0
        for pair in segments:
            check(len(pair) == 2 and pair[0] == start and pair[1] >= start - 1, "segments", segments, expected)
            start = pair[1] + 1
        check(start <= self.network.depth, "BranchConfig.segments", segments, expected)

    @property
    def window_sizes(self) -> tuple[int | None, ...]:
        """Window side of every block."""
        w = self.window_size
        return w if isinstance(w, tuple) else (w,) * self.network.depth

    def drop_path_rates(self, count: int) -> tuple[float, ...]:
        """Stochastic depth rate of each of `count` residual blocks."""
        if self.drop_path_schedule == "constant":
            return (self.drop_path_rate,) * count
        return tuple(self.drop_path_rate * i / max(count - 1, 1) for i in range(count))


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
        for spec in specs:
            check(
                1 <= spec.low and spec.high <= num_branches,
                "InteractionConfig.units",
                f"{spec.low}..{spec.high}",
                f"branch numbers from 1 to {num_branches}",
            )
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
        out_blocks: For "single": the block behind which each level is taken; None makes all of them from the last.
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
        expected = len(self.out_strides) - 1 if self.kind == "regular" else 0
        check(
            len(self.intermediate_after) == expected,
            "MergingConfig.intermediate_after",
            self.intermediate_after,
            f"{expected} interactions for kind={self.kind!r} and {len(self.out_strides)} out_strides",
        )
        check(
            self.out_blocks is None or (self.kind == "single" and len(self.out_blocks) == len(self.out_strides)),
            "MergingConfig.out_blocks",
            self.out_blocks,
            f"None, or for kind='single' {len(self.out_strides)} blocks, one per out_stride",
        )


@dataclass(frozen=True, kw_only=True)
class PIIPConfig:
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
        for i, branch in enumerate(self.branches, 1):
            check(
                branch.segments is None or len(branch.segments) == count,
                f"PIIPConfig.branches[{i}].segments",
                branch.segments,
                f"{count} segments, one per interaction (interaction.num_interactions={count})",
            )
        for k in range(count):
            self.interaction.graph(k, len(self.branches))
        if self.merging is not None:
            self._check_merging(self.merging)

    def _check_merging(self, merging: MergingConfig) -> None:
        n = len(self.branches)
        chosen = self.merging_branches
        check(
            bool(chosen) and set(chosen) <= set(range(1, n + 1)) and len(set(chosen)) == len(chosen),
            "MergingConfig.branches",
            merging.branches,
            f"different numbers from 1 to {n}",
        )
        check(
            merging.kind != "single" or n == 1,
            "MergingConfig.kind",
            merging.kind,
            f"'simple' or 'regular' for {n} branches",
        )
        depth = self.branches[0].network.depth
        for block in merging.out_blocks or ():
            check(0 <= block < depth, "MergingConfig.out_blocks", block, f"blocks from 0 to {depth - 1}")
        for k in merging.intermediate_after:
            check(
                0 <= k < self.num_interactions,
                "MergingConfig.intermediate_after",
                k,
                f"interactions from 0 to {self.num_interactions - 1}",
            )

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

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, ready for JSON."""
        return _to_plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PIIPConfig:
        """Inverse of `to_dict`. Unknown or missing fields raise ConfigError."""
        data = dict(data)
        branches = [
            _build(BranchConfig, dict(b) | {"network": _network_from_dict(b.get("network", {}))})
            for b in data.pop("branches", ())
        ]
        if "interaction" in data:
            data["interaction"] = _build(InteractionConfig, data["interaction"])
        if data.get("merging") is not None:
            data["merging"] = _build(MergingConfig, data["merging"])
        return _build(cls, data | {"branches": branches})


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"family": value.family, **fields} if isinstance(value, NetworkConfig) else fields
    return [_to_plain(v) for v in value] if is_sequence(value) else value


def _network_from_dict(data: Mapping[str, Any]) -> NetworkConfig:
    data = dict(data)
    family = data.pop("family", None)
    check_choice("network.family", family, tuple(NetworkConfig.families))
    return _build(NetworkConfig.families[family], data)


def _build(cls: type, data: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    check(not unknown, cls.__name__, unknown, f"only the fields {', '.join(sorted(known))}")
    try:
        return cls(**data)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{cls.__name__}: {error}") from None
