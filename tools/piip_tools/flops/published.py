"""The counting rule behind the published #Param and #FLOPs, computed from a configuration.

The published numbers were counted on a lighter twin of the dense backbone: the same branches and interactions, but
position tables stored for the real token grid, no window padding, and instead of merging convolutions and feature
pyramid a classification head with 1000 classes. One square image of the configured size goes in.

A FLOP is one multiply-accumulate. Linear layers count without bias, convolutions with bias; norms count two per
element; activations, softmax and resizing count nothing. Attention and deformable sampling follow closed formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, singledispatch
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piip_core.branches import (
    BEiTConfig,
    Branch,
    ConvNeXtConfig,
    NetworkConfig,
    TimmConfig,
    UniPerceiverConfig,
    ViTConfig,
    build_branch,
)
from piip_core.branches.transformer import TransformerBranch
from piip_core.config import BranchConfig, ClassifierConfig, InteractionConfig, PIIPConfig, UnitSpec
from piip_core.meta import on_meta

NUM_CLASSES = 1000
SAMPLING_POINTS = 4  # the formula has this number whatever the model uses


@dataclass(frozen=True)
class Count:
    """Parameters and multiply-accumulates of a part of a model."""

    params: int = 0
    macs: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.params + other.params, self.macs + other.macs)

    def __mul__(self, number: int) -> Count:
        return Count(number * self.params, number * self.macs)


@dataclass(frozen=True, kw_only=True)
class PublishedCount:
    """Published count by part."""

    branches: tuple[Count, ...]  # Branch 1 first
    interactions: Count  # all together
    head: Count  # what stands in for merging and feature pyramid

    @property
    def total(self) -> Count:
        """Sum of all parts."""
        return _sum([*self.branches, self.interactions, self.head])


Rule = Literal["classifier", "separate classifiers", "merging", "vision tower"]


def published_rule(config: PIIPConfig | ClassifierConfig) -> Rule:
    """The rule that the published tables follow; of dense models "merging" where levels come from different blocks."""
    if isinstance(config, ClassifierConfig):
        return "separate classifiers" if config.head == "separate" else "classifier"
    merging = config.merging
    levels_differ = merging is not None and (merging.kind == "regular" or merging.out_blocks is not None)
    return "merging" if levels_differ else "classifier"


def published_count(config: PIIPConfig | ClassifierConfig, *, rule: Rule | None = None) -> PublishedCount:
    """Counts a model as the published tables do.

    Args:
        config: The model. With the classifier rules its `merging` plays no part, nor does its number of classes.
        rule: "classifier" puts one head on the merged branches (published ViT rows of detection and segmentation);
            "separate classifiers" gives each branch its own (published classification rows), as a single branch has
            with either; "merging" counts the merging of the dense model, without the work of its feature pyramid, and
            the projection of padded window positions (published rows with ConvNeXt branches); "vision tower" counts
            branches and interactions alone, the sampling of every interaction on the grids of the first one (published
            multimodal rows). None: `published_rule`, which never is "vision tower".
    """
    rule = rule or published_rule(config)
    config = config.pyramid if isinstance(config, ClassifierConfig) else config
    if rule == "merging":
        head = _dense_head(config)
    else:
        head = Count() if rule == "vision tower" else _classifier(config, separate=rule == "separate classifiers")
    return PublishedCount(
        branches=tuple(_branch(branch, dense=rule in ("merging", "vision tower")) for branch in config.branches),
        interactions=_interactions(config, sampled_after=0 if rule == "vision tower" else None),
        head=head,
    )


def _interactions(config: PIIPConfig, *, sampled_after: int | None) -> Count:
    """All interactions; deformable sampling is counted on the grids after `sampled_after`, or each on its own."""
    total = Count()
    for k in range(config.num_interactions):
        dims, tokens = config.dims_after(k), _tokens_after(config, k)
        sampled = tokens if sampled_after is None else _tokens_after(config, sampled_after)
        for unit in _graph(config.interaction, k, len(config.branches)):
            low, high = unit.low - 1, unit.high - 1
            for to, source, wanted in ((low, high, unit.into_low), (high, low, unit.into_high)):
                if wanted:
                    total += _injection(config.interaction, tokens[to], dims[to], tokens[source], dims[source])
                    total += _sampling(config.interaction, sampled[to], dims[to])
    return total


@cache
def _graph(config: InteractionConfig, k: int, branches: int) -> tuple[UnitSpec, ...]:
    return config.graph(k, branches)


def _tokens_after(config: PIIPConfig, interaction: int | None) -> list[int]:
    strides = config.strides_after(interaction)
    return [(branch.image_size // stride) ** 2 for branch, stride in zip(config.branches, strides, strict=True)]


def _sum(counts: Iterable[Count]) -> Count:
    return sum(counts, Count())


def _tokens(branch: BranchConfig, block: int = -1) -> int:
    return (branch.image_size // branch.network.strides[block]) ** 2


def _linear(tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Count:
    return Count(inputs * outputs + bias * outputs, tokens * inputs * outputs)


def _convolution(
    positions: int, kernel: int, inputs: int, outputs: int, *, groups: int = 1, bias: bool = True
) -> Count:
    weights = kernel * kernel * (inputs // groups) * outputs + bias * outputs
    return Count(weights, positions * weights)


def _norm(tokens: int, width: int) -> Count:
    return Count(2 * width, 2 * tokens * width)


def _rms_norm(tokens: int, width: int) -> Count:
    return Count(width)


@cache
def _branch(branch: BranchConfig, *, dense: bool) -> Count:
    return _network(branch.network, branch, dense=dense)


@singledispatch
def _network(network: NetworkConfig, branch: BranchConfig, *, dense: bool) -> Count:
    """Embedding and blocks of a branch; one implementation per family. `dense`: the rules of real models."""
    raise NotImplementedError(f"no published counting rule for {type(network).__name__}")


@_network.register
def _vit(network: ViTConfig, branch: BranchConfig, *, dense: bool) -> Count:
    width = network.embed_dim
    tokens = _tokens(branch) + network.class_token
    norm = _norm if network.norm == "layernorm" else _rms_norm
    attention = norm(tokens, width) * 2 if network.qk_norm else Count()
    scales = 0 if network.layer_scale is None else 2 * width
    blocks = _blocks(network, branch, norm, qkv_bias=3 * width * network.qkv_bias, dense=dense)
    # The classifier's position table covers the real grid
    grid = network.pos_grid**2 if dense else _tokens(branch)
    embeddings = _patches(network, branch, bias=not network.pre_norm)
    embeddings += Count((grid + network.class_token + network.class_position) * width)
    embeddings += norm(tokens, width) if network.pre_norm else Count()
    return embeddings + blocks + (attention + Count(scales)) * network.depth


@_network.register
def _beit(network: BEiTConfig, branch: BranchConfig, *, dense: bool) -> Count:
    width = network.embed_dim
    own = (2 * network.bias_window - 1) ** 2 * network.num_heads + (0 if network.layer_scale is None else 2 * width)
    blocks = _blocks(network, branch, _norm, qkv_bias=2 * width * network.qkv_bias, dense=dense)
    return _patches(network, branch) + blocks + Count(own) * network.depth


@_network.register
def _uniperceiver(network: UniPerceiverConfig, branch: BranchConfig, *, dense: bool) -> Count:
    width, tokens = network.embed_dim, _tokens(branch)
    embeddings = Count((tokens + network.num_frames) * width) + _norm(tokens, width)
    blocks = _blocks(network, branch, _norm, qkv_bias=3 * width, dense=dense)
    return _patches(network, branch) + embeddings + blocks + Count(2 * width) * network.depth


def _patches(network: ViTConfig | BEiTConfig | UniPerceiverConfig, branch: BranchConfig, *, bias: bool = True) -> Count:
    return _convolution(_tokens(branch), network.patch_size, 3, network.embed_dim, bias=bias)


def _blocks(
    network: ViTConfig | BEiTConfig | UniPerceiverConfig,
    branch: BranchConfig,
    norm: Callable[[int, int], Count],
    *,
    qkv_bias: int,
    dense: bool,
) -> Count:
    """What the blocks of all transformers have; `qkv_bias` is the number of those parameters."""
    width, patches = network.embed_dim, _tokens(branch)
    tokens = patches + network.class_token
    hidden = int(width * network.mlp_ratio)
    count = Count()
    for window in branch.window_sizes:
        keys = patches if window is None else window * window
        projected = tokens
        if window is not None and dense:
            side = branch.image_size // branch.network.strides[0]
            projected = (-(-side // window) * window) ** 2
        count += norm(tokens, width) * 2
        count += _linear(projected, width, 3 * width, bias=False) + Count(qkv_bias)
        count += Count(macs=2 * patches * keys * width)
        count += _linear(tokens, width, width)
        count += _linear(tokens, width, hidden) + _linear(tokens, hidden, width)
    return count


@_network.register
def _convnext(network: ConvNeXtConfig, branch: BranchConfig, *, dense: bool) -> Count:
    """Norms over channels are no layer that the published counter knows: they have parameters and no work."""
    dims = network.dims
    count = _convolution(_tokens(branch, 0), 4, 3, dims[0]) + Count(2 * dims[0])
    for block, (_, place) in enumerate(network.stage_of_blocks()):
        width, positions = dims[block], _tokens(branch, block)
        if place is None:
            before = dims[block - 1]
            count += Count(2 * before) + _convolution(positions, 2, before, width)
            continue
        hidden = 4 * width
        count += _convolution(positions, network.kernel_size, width, width, groups=width)
        count += Count(2 * width) + _linear(positions, width, hidden) + _linear(positions, hidden, width)
        count += Count(0 if network.layer_scale is None else width)
    return count


@_network.register
def _timm(network: TimmConfig, branch: BranchConfig, *, dense: bool) -> Count:
    """What no published model has: linears, convolutions and attention as executed, of the blocks that differ."""
    model = _without_memory(replace(branch, image_size=1))
    blocks = network.depth if isinstance(model, TransformerBranch) else 0
    sizes = [sum(p.numel() for p in model.model.blocks[index].parameters()) for index in range(blocks)]
    kinds = list(zip(sizes, branch.window_sizes, strict=True)) if blocks else list(range(network.depth))
    macs = 0
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            state = model.embed(torch.empty(1, 3, branch.image_size, branch.image_size))
        macs += counter.get_total_flops() // 2
        for index, kind in enumerate(kinds):
            if kinds.index(kind) == index:
                with FlopCounterMode(display=False) as counter:
                    state = model.run_block(state, index)
                macs += kinds.count(kind) * counter.get_total_flops() // 2
    return Count(sum(parameter.numel() for parameter in model.parameters()), macs)


@lru_cache(maxsize=8)
def _without_memory(branch: BranchConfig) -> Branch:
    with on_meta():
        return build_branch(branch)


@cache  # interactions between the same maps follow each other
def _injection(config: InteractionConfig, queries: int, query_dim: int, values: int, value_dim: int) -> Count:
    """One direction of an interaction unit, from `values` tokens into `queries` tokens."""
    feature_dim = query_dim if config.projection else value_dim
    count = Count(query_dim)
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
        count += _convolution(queries, 3, hidden, hidden, groups=hidden) + Count(query_dim)
    return count


def _deformable_attention(config: InteractionConfig, queries: int, width: int, values: int, value_dim: int) -> Count:
    samples, inner = config.num_heads * config.num_points, int(width * config.value_ratio)
    return (
        _linear(values, value_dim, inner)
        + _linear(queries, width, 3 * samples)  # two offsets and one weight per sample
        + _linear(queries, inner, width)
    )


def _sampling(config: InteractionConfig, queries: int, width: int) -> Count:
    """The formula for deformable sampling: four corners and the weight of each point."""
    return Count(macs=5 * queries * SAMPLING_POINTS * width) if config.attention == "deformable" else Count()


def _regular_attention(config: InteractionConfig, queries: int, width: int, values: int, value_dim: int) -> Count:
    return (
        _linear(queries, width, width, bias=False)
        + _linear(values, value_dim, width, bias=False) * 2
        + _linear(queries, width, width)
        + Count(macs=2 * queries * values * width)
    )


def _classifier(config: PIIPConfig, *, separate: bool) -> Count:
    tokens = [_tokens(branch) for branch in config.branches]
    dims = [branch.network.dims[-1] for branch in config.branches]
    if separate or len(dims) == 1:
        norms = [_rms_norm if getattr(b.network, "norm", None) == "rmsnorm" else _norm for b in config.branches]
        parts = zip(norms, tokens, dims, strict=True)
        return _sum(norm(n, width) + _linear(1, width, NUM_CLASSES) for norm, n, width in parts)
    # Norms and one linear per branch, weighted sum on the last branch's grid, norm, average, linear
    first, *others = zip(tokens, dims, strict=True)
    count = _norm(*first) + Count(len(dims))
    for n, width in others:
        count += _norm(n, width) + _linear(n, width, dims[0]) + _norm(n, dims[0])
    return count + _norm(tokens[config.largest_image - 1], dims[0]) + _linear(1, dims[0], NUM_CLASSES)


def _dense_head(config: PIIPConfig) -> Count:
    """Merging convolutions with their norms and activations; of the feature pyramid the parameters alone."""
    merging = config.merging
    if merging is None or merging.out_blocks is not None:
        return Count()
    count = _upsampling(config)
    for k in (*merging.intermediate_after, None) if merging.kind != "single" else ():
        dims, tokens = config.dims_after(k), _tokens_after(config, k)
        for number in config.merging_branches:
            count += _merged_branch(merging.kind, number, dims[0], dims[number - 1], tokens[number - 1])
            count += Count(1)
    return count


def _upsampling(config: PIIPConfig) -> Count:
    """Parameters of the deconvolutions of the feature pyramid."""
    merging = config.merging
    points = (*merging.intermediate_after, None) if merging.kind == "regular" else [None] * len(merging.out_strides)
    params = 0
    for k, want in zip(points, merging.out_strides, strict=True):
        width, have = config.dims_after(k)[0], config.strides_after(k)[config.largest_image - 1]
        doublings = max(have // want, 1).bit_length() - 1
        params += doublings * (4 * width * width + width) + (2 * width if doublings > 1 else 0)
    return Count(params)


def _merged_branch(kind: str, number: int, width: int, inputs: int, tokens: int) -> Count:
    norm_and_relu = _norm(tokens, width) + Count(macs=tokens * width)
    convolutions = 2 if kind == "simple" else int(number > 1)
    count = norm_and_relu if convolutions == 0 else Count()
    for i in range(convolutions):
        count += _convolution(tokens, 3, width if i else inputs, width, bias=False) + norm_and_relu
    return count
