"""The parameter-inverted image pyramid: branches in lock-step segments, interactions between them, merging."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .branches import Branch, BranchState, build_branch
from .config import MergingConfig, PIIPConfig
from .errors import ConfigError, UserError, check
from .interaction import Interaction
from .merging import BranchMerging, FeaturePyramid, FourFold
from .recompute import GradCheckpointing, run_checkpointed


def resize_for_branch(image: Tensor, factor: float) -> Tensor:
    """Shrinks an image (B, 3, H, W) by a factor, unless it is 1 or more, as published: bilinear, no antialiasing.

    Sides become floor(side * factor). The sampling step is 1 / factor and not the ratio of the sides, which differs
    where a side does not divide.
    """
    if factor >= 1:
        return image
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        # Up to the next float32, which ONNX has: 368 * float32(192 / 368) is 191.99999, times the next number 192
        steps = 2.0 ** (24 - math.frexp(factor)[1])
        factor = math.ceil(factor * steps) / steps
    return F.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)


class PIIP(nn.Module):
    """Branches and interactions, without merging (paper Figure 2).

    All branches run their blocks of a segment, then the interaction exchanges features, and so on; blocks that no
    interaction follows run at the end.

    Args:
        config: Branches from the largest model (Branch 1) to the largest image (last), and the interactions.

    Attributes:
        dims: Channels of the final map of each branch.
        strides: Stride of the final map of each branch, in pixels of the branch's own image.
        inference_only: Whether `prepare_for_inference` has folded weights.
    """

    inference_only = False

    def __init__(self, config: PIIPConfig) -> None:
        super().__init__()
        # A ModuleList, whose own type does not say what it holds
        self.branches = cast(Sequence[Branch], nn.ModuleList(map(build_branch, config.branches)))
        self.factors = [branch.image_size / config.image_size for branch in config.branches]
        self.interactions = nn.ModuleList()
        self.set_interactions(config)
        self.dims = [branch.dims[-1] for branch in self.branches]
        self.strides = [branch.strides[-1] for branch in self.branches]
        self.grad_checkpointing: GradCheckpointing = False

    def set_interactions(self, config: PIIPConfig) -> None:
        """Takes a configuration with other segments and fewer or more interactions after the same first ones.

        New ones pass features on unchanged until they are trained.
        """
        self.config = config
        self.segments = [config.segments(number) for number in range(1, len(self.branches) + 1)]
        kept = self.interactions[: config.num_interactions]
        new = (
            Interaction(config.dims_after(k), config.interaction.graph(k, len(self.branches)), config.interaction)
            for k in range(len(kept), config.num_interactions)
        )
        self.interactions = nn.ModuleList([*kept, *new])

    def forward(self, image: Tensor) -> list[Tensor]:
        """Final map of every branch, (B, C_i, H_i, W_i), for an image (B, 3, H, W) at the largest resolution."""
        return self.forward_intermediates(image)[0]

    def forward_intermediates(
        self, image: Tensor, after: Collection[int] = ()
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Final map of every branch, and the maps of all branches after each interaction (from 0) asked for.

        The image (B, 3, H, W) has the resolution of the largest branch image; every branch shrinks it for itself.
        """
        states, intermediates = self.forward_states(image, after)
        return to_maps(states), {k: to_maps(found) for k, found in intermediates.items()}

    def forward_states(
        self, image: Tensor, after: Collection[int] = (), *, stop_early: bool = False
    ) -> tuple[list[BranchState], dict[int, list[BranchState]]]:
        """As `forward_intermediates`, with what maps leave out: class tokens. Token maps are channels last.

        With `stop_early` it ends after the last interaction asked for.
        """
        states = [
            branch.embed(resize_for_branch(image, factor))
            for branch, factor in zip(self.branches, self.factors, strict=True)
        ]
        intermediates = {}
        for k, interaction in enumerate(self.interactions):
            states = [
                branch.run(state, segments[k][0], segments[k][1] + 1)
                for branch, state, segments in zip(self.branches, states, self.segments, strict=True)
            ]
            # Whole also where only what is cheap is recomputed: little of the work, and two fifths of what is kept
            tokens = run_checkpointed(bool(self.grad_checkpointing), interaction, [state.tokens for state in states])
            states = [state._replace(tokens=t) for state, t in zip(states, tokens, strict=True)]
            if k in after:
                intermediates[k] = states
            if stop_early and k == max(after, default=None):
                return states, intermediates
        done = [segments[-1][1] + 1 if segments else 0 for segments in self.segments]
        final = [
            branch.run(state, start, branch.num_blocks)
            for branch, state, start in zip(self.branches, states, done, strict=True)
        ]
        return final, intermediates

    def forward_blocks(self, image: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps of Branch 1 after the named blocks, (B, C, H, W) each, in that order, without any interaction."""
        branch, done, maps = self.branches[0], 0, {}
        state = branch.embed(resize_for_branch(image, self.factors[0]))
        for block in sorted(set(blocks)):
            state, done = branch.run(state, done, block + 1), block + 1
            maps[block] = state.tokens.permute(0, 3, 1, 2)
        return [maps[block] for block in blocks]

    def train(self, mode: bool = True) -> PIIP:
        """Sets training or evaluation mode.

        Raises:
            UserError: For training mode after `prepare_for_inference`.
        """
        if mode and self.inference_only:
            raise UserError(
                "a model changed by prepare_for_inference cannot be trained, its weights are folded: build the model "
                "again and load the checkpoint"
            )
        return super().train(mode)

    def set_grad_checkpointing(self, enable: GradCheckpointing = True) -> None:
        """Recomputes activations of blocks and interactions in the backward pass; see `GradCheckpointing`."""
        check(enable in (False, True, "cheap"), "grad_checkpointing", enable, "False, True or 'cheap'")
        self.grad_checkpointing = enable
        for branch in self.branches:
            branch.set_grad_checkpointing(enable)


def to_maps(states: Sequence[BranchState]) -> list[Tensor]:
    """The maps of branches, (B, C_i, H_i, W_i)."""
    return [state.tokens.permute(0, 3, 1, 2) for state in states]


class DensePIIP(nn.Module):
    """PIIP with merging and a feature pyramid: the backbone of detectors and segmentors.

    Args:
        config: With `merging` set.

    Attributes:
        out_dims: Channels of each output map.
        out_strides: Stride of each output map in input pixels.

    Raises:
        ConfigError: If `config.merging` is None or a pyramid level cannot be made.
    """

    def __init__(self, config: PIIPConfig) -> None:
        super().__init__()
        merging = config.merging
        if merging is None:
            raise ConfigError("PIIPConfig.merging=None: expected a MergingConfig for dense prediction")
        self.pyramid = PIIP(config)
        self.merging = _MergingSet(self.pyramid, merging) if merging.kind != "single" else None
        levels = len(merging.out_strides)
        if merging.kind == "regular":
            points = [*merging.intermediate_after, None]
            dims = [config.dims_after(k)[0] for k in points]
            strides = [config.strides_after(k)[config.largest_image - 1] for k in points]
        elif merging.out_blocks is not None:
            branch = self.pyramid.branches[0]
            dims = [branch.dims[block] for block in merging.out_blocks]
            strides = [branch.strides[block] for block in merging.out_blocks]
        else:
            stride = self.pyramid.strides[config.largest_image - 1]
            dims, strides = self.pyramid.dims[:1] * levels, [stride] * levels
        self.feature_pyramid = FeaturePyramid(
            dims, strides, merging.out_strides, norm=merging.pyramid_norm, num_groups=merging.num_groups
        )
        self.out_dims = self.feature_pyramid.out_dims
        self.out_strides = self.feature_pyramid.out_strides

    def forward(self, image: Tensor) -> list[Tensor]:
        """One map (B, C_l, H_l, W_l) per output stride for an image (B, 3, H, W)."""
        return dense_maps(self.pyramid, self.merging, self.feature_pyramid, image)

    def set_grad_checkpointing(self, enable: GradCheckpointing = True) -> None:
        """Recomputes activations of blocks and interactions in the backward pass; see `GradCheckpointing`."""
        self.pyramid.set_grad_checkpointing(enable)
        for level in self.feature_pyramid.levels.values():
            if isinstance(level, FourFold):
                level.grad_checkpointing = enable


def dense_maps(
    pyramid: PIIP, merging: _MergingSet | None, feature_pyramid: FeaturePyramid, image: Tensor
) -> list[Tensor]:
    """What a `DensePIIP` of these parts computes: one map (B, C_l, H_l, W_l) per output stride."""
    config, levels = pyramid.config.merging, len(feature_pyramid.out_strides)
    if config is not None and config.out_blocks is not None:
        return feature_pyramid(pyramid.forward_blocks(image, config.out_blocks))
    if merging is None:
        return feature_pyramid(pyramid(image) * levels)
    merged = merging(*pyramid.forward_intermediates(image, merging.after))
    return feature_pyramid(merged if len(merged) > 1 else merged * levels)


class _MergingSet(nn.Module):
    """The final merging and, for the regular form, those after intermediate interactions."""

    def __init__(self, pyramid: PIIP, merging: MergingConfig) -> None:
        super().__init__()
        config = pyramid.config
        merge = partial(
            BranchMerging,
            branches=config.merging_branches,
            grid=config.largest_image,
            convs=2 if merging.kind == "simple" else 1,
            num_groups=merging.num_groups,
        )
        self.after = merging.intermediate_after
        self.intermediate = nn.ModuleList(merge(config.dims_after(k)) for k in self.after)
        self.final = merge(pyramid.dims)

    def forward(self, final: list[Tensor], intermediates: dict[int, list[Tensor]]) -> list[Tensor]:
        """Merged maps, those of the intermediate interactions first."""
        merged = [merge(intermediates[k]) for k, merge in zip(self.after, self.intermediate, strict=True)]
        return [*merged, self.final(final)]


class ParameterLayers:
    """Layer of every parameter, as in the published training.

    Let d be the number of blocks of the first branch that takes part, which ConvNeXt branches do not. There are d + 2
    layers: embeddings are layer 0, block l of that branch is layer l + 1, block l of a branch with d' blocks is layer
    (l + 1) * d / d', which may be fractional, and everything else is the last layer, d + 1.

    Attributes:
        last: The last layer, that of interactions and heads; 0 if no branch takes part.
    """

    def __init__(self, pyramid: PIIP) -> None:
        self.pyramid = pyramid
        taking_part = (
            branch.num_blocks
            for branch in pyramid.branches
            if any(branch.layer_of(name) is not None for name, _ in branch.named_parameters())
        )
        self.depth = next(taking_part, 0)
        self.last = self.depth + 1 if self.depth else 0

    def __call__(self, name: str) -> float:
        """Layer of a parameter by its name relative to the pyramid."""
        parts = name.split(".", 2)
        if parts[0] != "branches":
            return self.last
        branch = self.pyramid.branches[int(parts[1])]
        layer = branch.layer_of(parts[2])
        return self.last if layer is None else layer * self.depth / branch.num_blocks
