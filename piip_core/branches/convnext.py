"""ConvNeXt from timm as a branch."""

from __future__ import annotations

from timm.layers import DropPath
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from ..config import BranchConfig
from ..networks import ConvNeXtConfig
from .base import Branch, BranchState, register_branch

__all__ = ["ConvNeXtBranch", "StagedBranch"]


class StagedBranch(Branch):
    """A timm network of the ConvNeXt kind: a stem, then stages of an optional downsampling and blocks.

    Blocks are numbered as in `ConvNeXtConfig`: the downsampling of a stage counts as a block. Parameters take no part
    in layer-wise learning-rate decay, as published.

    Args:
        config: The branch.
        model: With `stem` and `stages`, each of which has `downsample` and `blocks`; state dict below `model.`.
    """

    def __init__(self, config: BranchConfig, model: nn.Module) -> None:
        super().__init__(config)
        self.model = model
        self._steps = [
            f"{number}.{part}"
            for number, stage in enumerate(model.stages)
            for part in (
                *([] if isinstance(stage.downsample, nn.Identity) else ["downsample"]),
                *(f"blocks.{i}" for i in range(len(stage.blocks))),
            )
        ]
        blocks = [block for stage in model.stages for block in stage.blocks]
        for block, rate in zip(blocks, config.drop_path_rates(len(blocks)), strict=True):
            block.drop_path = DropPath(rate)

    def embed(self, image: Tensor) -> BranchState:
        return BranchState(self.model.stem(image).permute(0, 2, 3, 1))

    def run_block(self, state: BranchState, index: int) -> BranchState:
        block = self.model.stages.get_submodule(self._steps[index])
        return BranchState(block(state.tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def remove_block(self, index: int) -> None:
        self.model.stages.set_submodule(self._steps[index], nn.Identity())

    def layer_of(self, name: str) -> int | None:
        return None


@register_branch(ConvNeXtConfig)
class ConvNeXtBranch(StagedBranch):
    """A timm `ConvNeXt` without its final norm and head."""

    def __init__(self, config: BranchConfig) -> None:
        net: ConvNeXtConfig = config.network
        model = ConvNeXt(
            depths=net.depths,
            dims=net.stage_dims,
            kernel_sizes=net.kernel_size,
            ls_init_value=net.layer_scale,
            norm_eps=net.norm_eps,
            num_classes=0,
        )
        model.head = nn.Identity()
        super().__init__(config, model)
        self.dims, self.strides = net.dims, net.strides
