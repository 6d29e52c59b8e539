"""Networks of timm by name as branches."""

from __future__ import annotations

from timm.layers import DropPath
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from ..config import BranchConfig
from ..timm_network import TimmConfig
from .base import Branch, BranchState, register_branch
from .convnext import StagedBranch
from .timm_factory import create_model
from .transformer import TransformerBranch
from .window import MapAttention

__all__ = ["TimmTransformerBranch", "positioned"]


class TimmTransformerBranch(TransformerBranch):
    """A `VisionTransformer` or `Eva` of timm, with its own position embeddings and prefix tokens.

    Args:
        config: The branch.
        model: From `create_model`.
    """

    def __init__(self, config: BranchConfig, model: nn.Module) -> None:
        super().__init__(config)
        self.model = model
        self.dims, self.strides = config.network.dims, config.network.strides
        rates = config.drop_path_rates(len(model.blocks))
        for block, window, rate in zip(model.blocks, config.window_sizes, rates, strict=True):
            if isinstance(block.attn, MapAttention):
                block.attn.window_size = window
                block.attn.pad_before_qkv = config.window_padding == "before_qkv"
            for name in ("drop_path1", "drop_path2"):
                if hasattr(block, name):
                    setattr(block, name, DropPath(rate))

    def embed(self, image: Tensor) -> BranchState:
        patches = self.patch_map(image)
        grid = patches.shape[1:3]
        sequence, rotary = positioned(self.model, patches)
        sequence = self.model.norm_pre(sequence)
        count = self.model.num_prefix_tokens
        prefix = sequence[:, :count] if count else None
        return BranchState(sequence[:, count:].unflatten(1, grid), prefix, rotary)

    def patch_map(self, image: Tensor) -> Tensor:
        patch = self.strides[0]
        height, width = (side // patch * patch for side in image.shape[-2:])
        return self.model.patch_embed(image[..., :height, :width]).contiguous()  # as `TransformerBranch` does

    def run_block(self, state: BranchState, index: int) -> BranchState:
        block = self.model.blocks[index]
        if isinstance(block.attn, MapAttention):  # takes maps, and then windows
            return super().run_block(state, index)
        options = {}
        if state.rotary is not None:
            options["rope"] = state.rotary[index] if getattr(self.model, "rope_mixed", False) else state.rotary
        tokens, prefix = self.split(block(self.sequence(state), **options), state)
        return state._replace(tokens=tokens, prefix=prefix)


def positioned(model: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """A sequence (B, P + H * W, C) of prefix tokens and patches (B, H, W, C) with positions, and rotary positions.

    timm's own method for it is private. Public ones run it together with all blocks, and give no rotary positions;
    writing it anew would copy every kind of position embedding. Seen working with timm 1.0.31.
    """
    sequence = model._pos_embed(patches)
    return sequence if isinstance(sequence, tuple) else (sequence, None)


@register_branch(TimmConfig)
def _build(config: BranchConfig) -> Branch:
    net: TimmConfig = config.network
    model = create_model(
        net.name,
        patch_size=net.patch_size,
        keep_prefix_tokens=net.keep_prefix_tokens,
        options=dict(net.options),
    )
    if not isinstance(model, ConvNeXt):
        return TimmTransformerBranch(config, model)
    branch = StagedBranch(config, model)
    branch.dims, branch.strides = net.dims, net.strides
    return branch
