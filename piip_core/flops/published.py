"""The counting rule behind the published #Param and #FLOPs, computed from a configuration without building anything.

The published numbers were counted on a lighter twin of the dense backbone: the same branches and interactions, but
position tables stored for the real token grid, no window padding, and instead of merging convolutions and feature
pyramid a classification head with 1000 classes. One square image of the configured size goes in.

A FLOP is one multiply-accumulate. Linear layers count without bias, convolutions with bias; norms count two per
element; activations, softmax and resizing count nothing. Attention and deformable sampling follow closed formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal

from ..config import BranchConfig, InteractionConfig, NetworkConfig, PIIPConfig, ViTConfig

__all__ = ["Count", "PublishedCount", "published_count"]

NUM_CLASSES = 1000
SAMPLING_POINTS = 4  # the formula has this number whatever the model uses


@dataclass(frozen=True)
class Count:
    """Parameters and multiply-accumulates of a part of a model."""

    params: int = 0
    macs: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.params + other.params, self.macs + other.macs)


@dataclass(frozen=True, kw_only=True)
class PublishedCount:
    """Published count by part.

    Attributes:
        branches: Each branch, Branch 1 first.
        interactions: All interactions together.
        head: The head that stands in for merging and feature pyramid.
    """

    branches: tuple[Count, ...]
    interactions: Count
    head: Count

    @property
    def total(self) -> Count:
        """Sum of all parts."""
        return _sum([*self.branches, self.interactions, self.head])


def published_count(config: PIIPConfig, *, head: Literal["merged", "separate"] = "merged") -> PublishedCount:
    """Counts a model as the published tables do.

    Args:
        config: The model. Its `merging` plays no part.
        head: "merged" is one head on the merged branches, behind all published detection and segmentation rows;
            "separate" gives each branch its own (published classification rows). A single branch has its own.
    """
    branches = config.branches
    tokens = [_tokens(branch) for branch in branches]
    dims = [branch.network.embed_dim for branch in branches]
    units = [spec for k in range(config.num_interactions) for spec in config.interaction.graph(k, len(branches))]
    directions = [(u.low - 1, u.high - 1) for u in units if u.into_low]
    directions += [(u.high - 1, u.low - 1) for u in units if u.into_high]
    return PublishedCount(
        branches=tuple(_network(branch.network, branch) for branch in branches),
        interactions=_sum(
            _injection(config.interaction, tokens[to], dims[to], tokens[source], dims[source])
            for to, source in directions
        ),
        head=_merged_head(tokens, dims) if head == "merged" and len(branches) > 1 else _separate_heads(tokens, dims),
    )


def _sum(counts: Iterable[Count]) -> Count:
    return sum(counts, Count())


def _tokens(branch: BranchConfig) -> int:
    return (branch.image_size // branch.network.patch_size) ** 2


def _linear(tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Count:
    return Count(inputs * outputs + bias * outputs, tokens * inputs * outputs)


def _convolution(positions: int, kernel: int, inputs: int, outputs: int, *, groups: int = 1) -> Count:
    weights = kernel * kernel * (inputs // groups) * outputs
    return Count(weights + outputs, positions * (weights + outputs))


def _norm(tokens: int, width: int) -> Count:
    return Count(2 * width, 2 * tokens * width)


def _parameter(size: int) -> Count:
    return Count(params=size)


@singledispatch
def _network(network: NetworkConfig, branch: BranchConfig) -> Count:
    """Embedding and blocks of a branch; one implementation per family."""
    raise NotImplementedError(f"no published counting rule for {type(network).__name__}")


@_network.register
def _vit(network: ViTConfig, branch: BranchConfig) -> Count:
    width, patch = network.embed_dim, network.patch_size
    hidden = int(width * network.mlp_ratio)
    patches = _tokens(branch)
    tokens = patches + network.class_token
    scales = 0 if network.layer_scale is None else 2 * width
    count = _convolution(patches, patch, 3, width) + _parameter(tokens * width)  # patches, positions, class token
    for window in branch.window_sizes:
        keys = patches if window is None else window * window
        count += _norm(tokens, width)
        count += _linear(tokens, width, 3 * width, bias=network.qkv_bias)
        count += Count(macs=2 * patches * keys * width)
        count += _linear(tokens, width, width)
        count += _norm(tokens, width)
        count += _linear(tokens, width, hidden) + _linear(tokens, hidden, width)
        count += _parameter(scales)
    return count


def _injection(config: InteractionConfig, queries: int, query_dim: int, values: int, value_dim: int) -> Count:
    """One direction of an interaction unit, from `values` tokens into `queries` tokens."""
    feature_dim = query_dim if config.projection else value_dim
    count = _parameter(query_dim)
    if config.projection:
        count += _linear(values, value_dim, query_dim)
    if config.norm == "layernorm":
        count += _norm(queries, query_dim) + _norm(values, feature_dim)
    attention = _deformable_attention if config.attention == "deformable" else _regular_attention
    count += attention(config, queries, query_dim, values, feature_dim)
    if config.ffn:
        hidden = int(query_dim * config.ffn_ratio)
        count += _norm(queries, query_dim) if config.norm == "layernorm" else Count()
        count += _linear(queries, query_dim, hidden) + _linear(queries, hidden, query_dim)
        count += _convolution(queries, 3, hidden, hidden, groups=hidden) + _parameter(query_dim)
    return count


def _deformable_attention(config: InteractionConfig, queries: int, width: int, values: int, value_dim: int) -> Count:
    samples, inner = config.num_heads * config.num_points, int(width * config.value_ratio)
    return (
        _linear(values, value_dim, inner)
        + _linear(queries, width, 3 * samples)  # two offsets and one weight per sample
        + _linear(queries, inner, width)
        + Count(macs=5 * queries * SAMPLING_POINTS * width)
    )


def _regular_attention(config: InteractionConfig, queries: int, width: int, values: int, value_dim: int) -> Count:
    return (
        _linear(queries, width, width, bias=False)
        + _linear(values, value_dim, width, bias=False)
        + _linear(values, value_dim, width, bias=False)
        + _linear(queries, width, width)
        + Count(macs=2 * queries * values * width)
    )


def _merged_head(tokens: list[int], dims: list[int]) -> Count:
    """Norms and one linear per branch, weighted sum on the last branch's grid, norm, average, linear."""
    first, *others = zip(tokens, dims, strict=True)
    count = _norm(*first) + _parameter(len(dims))
    for n, width in others:
        count += _norm(n, width) + _linear(n, width, dims[0]) + _norm(n, dims[0])
    return count + _norm(tokens[-1], dims[0]) + _linear(1, dims[0], NUM_CLASSES)


def _separate_heads(tokens: list[int], dims: list[int]) -> Count:
    return _sum(_norm(n, width) + _linear(1, width, NUM_CLASSES) for n, width in zip(tokens, dims, strict=True))
