"""Branch merging and feature pyramids (paper section III-C).

`BranchMerging` turns the maps of all branches into one (equations 3 and 4), `FeaturePyramid` makes the levels that
detectors and segmentors expect, `ClassificationHeads` and `ClassificationMerging` class scores, `TokenMerging` the
visual tokens of a multimodal language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .errors import ConfigError, check, check_choice
from .ops.deconvolution import Deconvolution
from .recompute import GradCheckpointing, run_checkpointed

GROUP_NORM_EPS = 1e-5
LAYER_NORM_EPS = 1e-6


class BranchMerging(nn.Module):
    """Weighted sum of the branches on the grid of one of them, in the width of the first (equations 3 and 4).

    Args:
        dims: Width of every branch, Branch 1 first.
        branches: Numbers (from 1) of the branches that take part.
        convs: 3x3 convolutions per branch: 2 in the simple form; 1 in the regular form, where Branch 1 has none.
        num_groups: Groups of the group norms.
        grid: Number of the branch whose grid the sum has, one with the largest image; None for the last.
    """

    def __init__(
        self,
        dims: Sequence[int],
        branches: Sequence[int],
        *,
        convs: int,
        num_groups: int,
        grid: int | None = None,
    ) -> None:
        super().__init__()
        self.grid = len(dims) if grid is None else grid
        self.branches = tuple(branches)
        self.out_dim = dims[0]
        _check_groups(self.out_dim, num_groups)
        self.projections = nn.ModuleDict()
        self.weights = nn.Parameter(torch.ones(len(self.branches)))
        self.register_load_state_dict_pre_hook(_join_scalar_weights)
        for number in self.branches:
            count = 0 if convs == 1 and number == 1 else convs
            self.projections[str(number)] = _projection(dims[number - 1], self.out_dim, count, num_groups)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of all branches, (B, C_i, H_i, W_i), to (B, C_1, H, W) on the chosen grid."""
        projected = (self.projections[str(number)](maps[number - 1]) for number in self.branches)
        return _sum_on_grid(projected, self.weights, maps[self.grid - 1].shape[-2:])


def _sum_on_grid(maps: Iterable[Tensor], weights: Tensor, size: torch.Size) -> Tensor:
    """Weighted sum of maps (B, C, H_i, W_i), resized to one size (equation 4)."""
    resized = (
        x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps
    )
    return reduce(torch.add, (x * weight for x, weight in zip(resized, weights.unbind(), strict=True)))


def _join_scalar_weights(
    module: BranchMerging | ClassificationMerging, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Reads files in which the weights were a scalar for each branch."""
    names = [f"{prefix}weights.{number}" for number in module.projections]
    if all(name in state_dict for name in names):
        state_dict[f"{prefix}weights"] = torch.stack([state_dict.pop(name) for name in names])


def _projection(in_dim: int, out_dim: int, convs: int, num_groups: int) -> nn.Sequential:
    """`convs` times convolution, group norm, ReLU; without convolutions just group norm and ReLU."""
    layers: list[nn.Module] = []
    for i in range(max(convs, 1)):
        if convs:
            conv = nn.Conv2d(in_dim if i == 0 else out_dim, out_dim, 3, padding=1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (9 * out_dim)))
            layers.append(conv)
        layers += [nn.GroupNorm(num_groups, out_dim, eps=GROUP_NORM_EPS), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class FeaturePyramid(nn.Module):
    """Brings one map per level to the level's stride, with deconvolutions upwards and max pooling downwards.

    Args:
        in_dims: Channels of the input map of each level; they are kept.
        in_strides: Stride of the input map of each level, in input pixels.
        out_strides: Stride wanted for each level.
        norm: "group" or "layer" (channel-wise) norm between the two deconvolutions of a four-fold upsampling.
        num_groups: Groups of the group norm.

    Raises:
        ConfigError: If a level would need an upsampling other than two- or four-fold, or a fractional pooling.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        in_strides: Sequence[int],
        out_strides: Sequence[int],
        *,
        norm: str = "group",
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.out_dims = tuple(in_dims)
        self.out_strides = tuple(out_strides)
        self.levels = nn.ModuleDict(
            {
                str(want): _level(dim, have, want, norm, num_groups)
                for dim, have, want in zip(in_dims, in_strides, out_strides, strict=True)
            }
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map (B, C_l, H_l, W_l) per level, before and after; odd sides lose their last row when pooled."""
        return [level(x) for level, x in zip(self.levels.values(), maps, strict=True)]


def _level(dim: int, have: int, want: int, norm: str, num_groups: int) -> nn.Module:
    if have == want:
        return nn.Identity()
    if want > have and want % have == 0:
        return nn.MaxPool2d(want // have)
    if have == 2 * want:
        return nn.Sequential(Deconvolution(dim, dim))
    if have == 4 * want:
        if norm == "group":
            _check_groups(dim, num_groups)
            norm_layer: nn.Module = nn.GroupNorm(num_groups, dim, eps=GROUP_NORM_EPS)
        else:
            norm_layer = LayerNorm2d(dim, eps=LAYER_NORM_EPS)
        return FourFold(Deconvolution(dim, dim), norm_layer, nn.GELU(), Deconvolution(dim, dim))
    raise ConfigError(
        f"MergingConfig.out_strides: a map of stride {have} cannot be brought to stride {want}; "
        f"possible are {have // 4}, {have // 2}, {have} and multiples of it"
    )


class FourFold(nn.Sequential):
    """Deconvolution, norm, GELU, deconvolution.

    Attributes:
        grad_checkpointing: Whether the backward pass recomputes norm and GELU; it needs no deconvolution for that.
    """

    grad_checkpointing: GradCheckpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 4 * H, 4 * W)."""
        first, norm, gelu, last = self
        return run_checkpointed(bool(self.grad_checkpointing), lambda x: last(gelu(norm(x))), first(x))


def _check_groups(dim: int, num_groups: int) -> None:
    if dim % num_groups:
        raise ConfigError(f"num_groups={num_groups}: expected a divisor of the merged width {dim}")


class ClassificationHeads(nn.Module):
    """One norm and linear classifier per branch, as its pretrained network has; the scores are averaged (III-C).

    Args:
        norms: Final norm of every branch's network, Branch 1 first.
        dims: Width of every branch.
        num_classes: 0 for none, to get pooled features.
        drop_rate: Dropout before the classifiers.
    """

    def __init__(
        self, norms: Sequence[nn.Module], dims: Sequence[int], num_classes: int, *, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_features = sum(dims)
        self.dims = tuple(dims)
        self.norms = nn.ModuleDict({str(number): norm for number, norm in enumerate(norms, 1)})
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Gives every branch a new classifier; 0 classes: none."""
        self.classifiers = nn.ModuleDict(
            {str(number): _classifier(dim, num_classes) for number, dim in enumerate(self.dims, 1) if num_classes}
        )

    def forward(self, tokens: Sequence[Tensor], *, pre_logits: bool = False) -> Tensor:
        """Tokens of every branch, (B, N_i, C_i), to logits (B, num_classes), the tokens of a branch averaged.

        With `pre_logits`, or without classes, it gives the pooled features of all branches side by side,
        (B, num_features).
        """
        pooled = [self.drop(norm(x).mean(dim=1)) for norm, x in zip(self.norms.values(), tokens, strict=True)]
        if pre_logits or not self.classifiers:
            return torch.cat(pooled, dim=1)
        logits = [classifier(x) for classifier, x in zip(self.classifiers.values(), pooled, strict=True)]
        return sum(logits) / len(logits)

    def forward_maps(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of all branches, (B, C_i, H_i, W_i), normalised."""
        pairs = zip(self.norms.values(), maps, strict=True)
        return [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in pairs]


class ClassificationMerging(nn.Module):
    """Merged classification head (from-scratch PIIP-B): merge all branches, average over positions, one linear.

    Branches but the first go through group norm, linear and group norm (paper section III-C and Table VII).

    Args:
        dims: Width of every branch, Branch 1 first.
        num_classes: Number of classes; 0 for none, to get pooled features.
        num_groups: Groups of the group norms.
        grid: Number of the branch whose grid the sum has, one with the largest image; None for the last.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        num_groups: int = 32,
        grid: int | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for dim in dims:
            _check_groups(dim, num_groups)
        self.grid = len(dims) if grid is None else grid
        self.num_features = dims[0]
        self.projections = nn.ModuleDict()
        for number, dim in enumerate(dims, 1):
            project = [nn.Conv2d(dim, dims[0], 1), nn.GroupNorm(num_groups, dims[0])] if number > 1 else []
            self.projections[str(number)] = nn.Sequential(nn.GroupNorm(num_groups, dim), *project)
        self.weights = nn.Parameter(torch.ones(len(dims)))
        self.register_load_state_dict_pre_hook(_join_scalar_weights)
        self.norm = LayerNorm2d(dims[0], eps=LAYER_NORM_EPS)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one; 0 classes: by none."""
        self.classifier = _classifier(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, maps: Sequence[Tensor], *, pre_logits: bool = False) -> Tensor:
        """Maps of all branches, (B, C_i, H_i, W_i), to logits (B, num_classes).

        With `pre_logits`, or without classes, it gives the pooled features, (B, C_1).
        """
        pooled = self.drop(self.forward_maps(maps).mean(dim=(-2, -1)))
        return pooled if pre_logits else self.classifier(pooled)

    def forward_maps(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of all branches, (B, C_i, H_i, W_i), merged to (B, C_1, H, W) and normalised."""
        projected = (projection(x) for projection, x in zip(self.projections.values(), maps, strict=True))
        return self.norm(_sum_on_grid(projected, self.weights, maps[self.grid - 1].shape[-2:]))


def _classifier(dim: int, num_classes: int) -> nn.Linear:
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class TokenMerging(nn.Module):
    """Visual tokens for a language model: one projector per branch, on one grid, summed (paper section III-D).

    A branch's map is resized to the grid, bilinearly and in fp32, and projected: linear, norm, GELU, linear. With one
    branch and no norm that is the projector of LLaVA-1.5. A map that grows is resized after the first linear, which
    commutes with interpolation and has fewer positions before it.

    Args:
        dims: Width of every branch, Branch 1 first.
        embed_dim: Width of the tokens, that of the language model.
        norm: "group" over channel groups and positions; "layer" over channels, without parameters; "none".
        num_groups: Groups of the group norm.
        grid: Side of the square grid of the tokens; None for that of `grid_branch`.
        grid_branch: Number of the branch whose grid carries the tokens; None for the last.
        merge: Side of the squares of cells of that grid that become one token each.
        merge_by: What the first linear sees of such a square: "average", or "shuffle", all its cells side by side.
        newline: End every row of tokens with one more, which is learned.
    """

    def __init__(
        self,
        dims: Sequence[int],
        embed_dim: int,
        *,
        norm: Literal["group", "layer", "none"] = "group",
        num_groups: int = 32,
        grid: int | None = None,
        grid_branch: int | None = None,
        merge: int = 1,
        merge_by: Literal["average", "shuffle"] = "shuffle",
        newline: bool = False,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("group", "layer", "none"))
        check_choice("merge_by", merge_by, ("average", "shuffle"))
        check(merge > 0, "merge", merge, "a positive number of cells")
        fits = grid_branch is None or 1 <= grid_branch <= len(dims)
        check(fits, "grid_branch", grid_branch, f"a branch from 1 to {len(dims)}")
        self.grid, self.grid_branch, self.merge = grid, grid_branch or len(dims), merge
        shuffle = merge > 1 and merge_by == "shuffle"
        cells: Callable[[int], nn.Module] = nn.PixelUnshuffle if shuffle else nn.AvgPool2d
        self.cells = cells(merge) if merge > 1 else None
        self.projections = nn.ModuleDict(
            {
                str(number): _TokenProjection(dim * merge**2 if shuffle else dim, embed_dim, norm, num_groups)
                for number, dim in enumerate(dims, 1)
            }
        )
        self.newline = nn.Parameter(torch.randn(embed_dim) / math.sqrt(embed_dim)) if newline else None

    def grid_size(self, maps: Sequence[Tensor]) -> tuple[int, int]:
        """Height and width of the grid for these maps, before cells are merged."""
        height, width = maps[self.grid_branch - 1].shape[-2:]
        return (height, width) if self.grid is None else (self.grid, self.grid)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Maps of all branches, (B, C_i, H_i, W_i), to tokens (B, H * W, embed_dim), row by row.

        `size` is that of the grid before cells are merged, if another than `grid_size`. With `newline` there are
        H * (W + 1) tokens.

        Raises:
            ConfigError: If the grid is no multiple of the squares that are merged.
        """
        size = size or self.grid_size(maps)
        fits = size[0] % self.merge == size[1] % self.merge == 0
        check(fits, "merge", self.merge, f"a divisor of the sides of the grid of {size[0]} x {size[1]} cells")
        pairs = zip(maps, self.projections.values(), strict=True)
        tokens = (projection(x.permute(0, 2, 3, 1), size, self.cells) for x, projection in pairs)
        merged = reduce(torch.add, tokens)
        if self.newline is not None:
            ends = self.newline.to(merged.dtype).expand(*merged.shape[:2], 1, -1)
            merged = torch.cat((merged, ends), dim=2)
        return merged.flatten(1, 2)


class _TokenProjection(nn.Module):
    """Linear, norm, GELU, linear over channels-last maps, resized before or after the first linear."""

    def __init__(self, in_dim: int, out_dim: int, norm: str, num_groups: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        if norm == "group":
            _check_groups(out_dim, num_groups)
            self.norm: nn.Module = nn.GroupNorm(num_groups, out_dim, eps=GROUP_NORM_EPS)
        else:
            self.norm = nn.LayerNorm(out_dim, elementwise_affine=False) if norm == "layer" else nn.Identity()
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor, size: tuple[int, int], cells: nn.Module | None = None) -> Tensor:
        """(B, H, W, C) to (B, *size, embed_dim), with fewer positions where `cells` merges them."""
        commutes = not isinstance(cells, nn.PixelUnshuffle)
        if commutes and x.shape[1] * x.shape[2] < size[0] * size[1]:
            x = _resize(self.linear_1(x), size, cells)  # equal: the weights of an interpolation add up to 1
        else:
            x = self.linear_1(_resize(x, size, cells))
        if isinstance(self.norm, nn.GroupNorm):  # over channel groups and positions: channels first
            x = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            x = self.norm(x)
        return self.linear_2(F.gelu(x))


def _resize(x: Tensor, size: tuple[int, int], cells: nn.Module | None) -> Tensor:
    """Bilinear resizing of a channels-last map (B, H, W, C), in fp32, before `cells` merges cells of it."""
    if x.shape[1:3] != size:
        resized = F.interpolate(x.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", align_corners=False)
        x = resized.permute(0, 2, 3, 1).to(x.dtype)
    return x if cells is None else cells(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
