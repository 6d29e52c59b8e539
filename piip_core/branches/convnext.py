"""ConvNeXt from timm as a branch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from ..errors import check
from .base import Branch, BranchConfig, BranchState, NetworkConfig, freeze_sequences, register_branch, set_drop_path


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig(NetworkConfig):
    """ConvNeXt (version 1): four stages of depthwise-convolution blocks.

    Blocks are numbered through all stages, and the downsampling before each stage but the first counts as one: with
    depths (3, 3, 9, 3), blocks 0-2, downsampling 3, blocks 4-6, downsampling 7, ..., 20. A downsampling has the
    channels and the stride of the stage that it leads to.

    Args:
        depths: Blocks of each stage.
        stage_dims: Channels of each stage.
        kernel_size: Side of the depthwise kernels.
        layer_scale: Initial value of the per-channel residual scales; None for a network without them.
        norm_eps: Epsilon of the layer norms.
    """

    family: ClassVar[str] = "convnext"

    depths: tuple[int, ...] = (3, 3, 9, 3)
    stage_dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 7
    layer_scale: float | None = 1e-6
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        freeze_sequences(self, "depths", "stage_dims")
        for field in ("depths", "stage_dims"):
            value = getattr(self, field)
            fits = len(value) == 4 and min(value) > 0
            check(fits, f"ConvNeXtConfig.{field}", value, "4 positive integers, one for each of 4 stages")
        stages = [stage for stage, _ in self.stage_of_blocks()]
        dims, strides = tuple(self.stage_dims[stage] for stage in stages), tuple(4 * 2**stage for stage in stages)
        self.set_blocks(dims, strides, no_windows="a ConvNeXt has no attention")

    def stage_of_blocks(self) -> tuple[tuple[int, int | None], ...]:
        """For every block its stage and its index in it; None is the downsampling into that stage."""
        stages = (
            [(stage, None)] * (stage > 0) + [(stage, i) for i in range(count)]
            for stage, count in enumerate(self.depths)
        )
        return tuple(itertools.chain.from_iterable(stages))

    def last_blocks(self) -> tuple[int, ...]:
        """Index of the last block of each stage."""
        return tuple(itertools.accumulate(self.depths, lambda last, count: last + 1 + count, initial=-2))[1:]


class StagedBranch(Branch):
    """A timm network of the ConvNeXt kind: a stem, then stages of an optional downsampling and blocks.

    Blocks are numbered as in `ConvNeXtConfig`: the downsampling of a stage counts as a block. Parameters take no part
    in layer-wise learning-rate decay, as published.

    Args:
        config: The branch.
        model: The network; its state dict is below `model.`.
    """

    model: ConvNeXt

    def __init__(self, config: BranchConfig, model: ConvNeXt) -> None:
        super().__init__(config)
        self.model = model
        self._steps = [path for _, path in steps_of(model)]
        set_drop_path([model.stages.get_submodule(path) for path in self._steps if "blocks" in path], config)

    def embed(self, image: Tensor) -> BranchState:
        """Runs the stem on an image (B, 3, H, W); the map is (B, H', W', C) of stride 4."""
        return BranchState(self.model.stem(image).permute(0, 2, 3, 1))

    def run_block(self, state: BranchState, index: int) -> BranchState:
        """Runs one block or downsampling on the map (B, H, W, C); a downsampling halves height and width."""
        block = self.model.stages.get_submodule(self._steps[index])
        return BranchState(block(state.tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def layer_of(self, name: str) -> int | None:
        """None: no parameter takes part in the decay."""
        return None


def steps_of(model: ConvNeXt) -> list[tuple[int, str]]:
    """Stage, and path below `stages`, of every block and downsampling, in the order they run."""
    stages: Iterable[Any] = model.stages
    return [
        (number, f"{number}.{part}")
        for number, stage in enumerate(stages)
        for part in (
            *([] if isinstance(stage.downsample, nn.Identity) else ["downsample"]),
            *(f"blocks.{i}" for i in range(len(stage.blocks))),
        )
    ]


@register_branch(ConvNeXtConfig)
class ConvNeXtBranch(StagedBranch):
    """A timm `ConvNeXt` without its final norm and head."""

    def __init__(self, config: BranchConfig[ConvNeXtConfig]) -> None:
        net = config.network
        model = ConvNeXt(
            depths=net.depths,
            dims=net.stage_dims,
            kernel_sizes=net.kernel_size,
            ls_init_value=net.layer_scale,
            norm_eps=net.norm_eps,
            num_classes=0,
        )
        model.set_submodule("head", nn.Identity())
        super().__init__(config, model)
