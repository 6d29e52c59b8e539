"""Plain vision transformers from timm as branches: DeiT, DeiT III, AugReg, MAE."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import BranchConfig, ViTConfig
from .base import Branch, BranchState, register_branch
from .window import MapAttention

__all__ = ["ViTBranch", "resize_position_grid"]


def resize_position_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resizes position embeddings to another token grid: bicubic, in fp32, without antialiasing.

    Args:
        grid: (1, N, C) with N a square number, row-major.
        height: Rows of the new grid.
        width: Columns of the new grid.

    Returns:
        (1, height, width, C) in the dtype of `grid`.
    """
    side = int(grid.shape[1] ** 0.5)
    table = grid.unflatten(1, (side, side))
    if (height, width) == (side, side):
        return table
    table = F.interpolate(table.permute(0, 3, 1, 2).float(), size=(height, width), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).to(grid.dtype)


@register_branch(ViTConfig)
class ViTBranch(Branch):
    """A timm `VisionTransformer` without its final norm and head, run on channels-last token maps.

    The state dict below `model.` has timm's names. Position embeddings are stored for `pos_grid` x `pos_grid` patches
    and resized to the token grid of each input.
    """

    def __init__(self, config: BranchConfig) -> None:
        super().__init__(config)
        net: ViTConfig = config.network
        self.model = VisionTransformer(
            img_size=net.pos_grid * net.patch_size,
            patch_size=net.patch_size,
            embed_dim=net.embed_dim,
            depth=net.depth,
            num_heads=net.num_heads,
            mlp_ratio=net.mlp_ratio,
            qkv_bias=net.qkv_bias,
            init_values=net.layer_scale,
            class_token=net.class_token,
            no_embed_class=True,
            norm_layer=partial(nn.LayerNorm, eps=net.norm_eps),
            attn_layer=MapAttention,
            dynamic_img_size=True,
            final_norm=False,
            global_pool="",
            num_classes=0,
        )
        self.dims = (net.embed_dim,) * net.depth
        self.strides = (net.patch_size,) * net.depth
        self._configure_blocks()

    def _configure_blocks(self) -> None:
        config, depth = self.config, self.num_blocks
        for i, (block, window) in enumerate(zip(self.model.blocks, config.window_sizes, strict=True)):
            block.attn.window_size = window
            block.attn.pad_before_qkv = config.window_padding == "before_qkv"
            share = 1.0 if config.drop_path_schedule == "constant" else i / max(depth - 1, 1)
            # timm only knows the linear schedule, so both are set here
            block.drop_path1 = DropPath(config.drop_path_rate * share)
            block.drop_path2 = DropPath(config.drop_path_rate * share)

    def embed(self, image: Tensor) -> BranchState:
        patch = self.config.network.patch_size
        height, width = (side // patch for side in image.shape[-2:])
        tokens = self.model.patch_embed(image[..., : height * patch, : width * patch])
        tokens = tokens + resize_position_grid(self.model.pos_embed, height, width)
        if self.model.cls_token is None:
            return BranchState(tokens)
        return BranchState(tokens, self.model.cls_token.expand(len(tokens), -1, -1))

    def run_block(self, state: BranchState, index: int) -> BranchState:
        block = self.model.blocks[index]
        if state.prefix is None:
            return BranchState(block(state.tokens))
        grid, count = state.tokens.shape[1:3], state.prefix.shape[1]
        sequence = block(torch.cat((state.prefix, state.tokens.flatten(1, 2)), dim=1))
        return BranchState(sequence[:, count:].unflatten(1, grid), sequence[:, :count])

    def layer_of(self, name: str) -> int | None:
        parts = name.split(".")[1:]  # without "model"
        return int(parts[1]) + 1 if parts[0] == "blocks" else 0
