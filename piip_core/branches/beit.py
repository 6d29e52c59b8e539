"""BEiT and BEiTv2 from timm as branches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import gen_relative_position_index
from timm.models.beit import Attention, Beit
from torch import Tensor, nn

from ..errors import ConfigError, check
from .base import BranchConfig, BranchState, register_branch
from .transformer import PlainTransformerConfig, TransformerBranch, attend_in_windows


@dataclass(frozen=True, kw_only=True)
class BEiTConfig(PlainTransformerConfig):
    """BEiT and BEiTv2: no position embedding, a relative position bias in every block.

    Sizes are as in `PlainTransformerConfig`.

    Args:
        qkv_bias: Biases of queries and values; keys have none.
        layer_scale: Initial value of the per-channel residual scales; None for a network without them.
        bias_window: Side of the square of tokens whose relative positions each block's table covers; for a block with
            windows it is the window. A global block needs images of exactly that many patches.
    """

    family: ClassVar[str] = "beit"

    qkv_bias: bool = True
    layer_scale: float | None = 1e-6
    bias_window: int = 14


class RelativeBiasAttention(Attention):
    """timm's BEiT attention on channels-last maps, without the three table entries for a class token.

    Args:
        embed_dim: Width of the tokens.
        num_heads: Attention heads.
        qkv_bias: Biases of queries and values.
        bias_window: Side of the square of tokens that the table covers.

    Attributes:
        window_size: `bias_window` for attention in windows; None for global attention, on maps of exactly that size.
    """

    bias_index: Tensor
    window_size: Any  # an integer or None; timm declares a pair

    def __init__(self, embed_dim: int, num_heads: int, *, qkv_bias: bool, bias_window: int) -> None:
        super().__init__(embed_dim, num_heads=num_heads, qkv_bias=qkv_bias)
        self.bias_window = bias_window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * bias_window - 1) ** 2, num_heads))
        self.register_buffer(
            "bias_index", torch.empty(bias_window**2, bias_window**2, dtype=torch.long), persistent=False
        )
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fills what no state dict holds, for a module that was built on the meta device."""
        side = (self.bias_window, self.bias_window)
        self.bias_index.copy_(gen_relative_position_index(side, device=self.bias_index.device))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attends within a map (B, H, W, C); timm's blocks hand on arguments that a branch never has."""
        if self.window_size is not None:
            return attend_in_windows(x, self.bias_window, self.attend)
        grid = x.shape[1:3]
        if grid != (self.bias_window, self.bias_window):
            raise ConfigError(
                f"a global BEiT block got {grid[0]} x {grid[1]} tokens: expected bias_window={self.bias_window} on "
                "both sides, for which it has relative positions; set BranchConfig.window_size for other images"
            )
        return self.attend(x.flatten(1, 2)).unflatten(1, grid)

    def attend(self, x: Tensor) -> Tensor:
        """Attention within sequences (B, N, C) that are squares of `bias_window` tokens, row by row."""
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)).to(qkv.dtype)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # A head's table fits into the fastest cache, the biases of all heads do not: head by head takes a third
        table, side = self.relative_position_bias_table.t().contiguous(), self.bias_index.shape
        bias = table.index_select(1, self.bias_index.flatten()).unflatten(1, side)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))


@register_branch(BEiTConfig)
class BEiTBranch(TransformerBranch):
    """A timm `Beit` without class token, whose blocks attend in windows with their own relative position bias."""

    def __init__(self, config: BranchConfig[BEiTConfig]) -> None:
        net = config.network
        expected = f"BEiTConfig.bias_window={net.bias_window}, for which the blocks have relative positions"
        for window in config.window_sizes:
            check(window in (None, net.bias_window), "BranchConfig.window_size", window, expected)
        padding = config.window_padding
        check(padding == "before_qkv", "BranchConfig.window_padding", padding, "'before_qkv' for BEiT")
        model = Beit(
            img_size=net.patch_size,  # no tables of timm's are used
            patch_size=net.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=net.embed_dim,
            depth=net.depth,
            num_heads=net.num_heads,
            mlp_ratio=net.mlp_ratio,
            init_values=net.layer_scale,
            norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=net.norm_eps)),
            use_abs_pos_emb=False,
        )
        model.register_parameter("cls_token", None)
        model.norm = nn.Identity()
        model.patch_embed.strict_img_size = False
        model.patch_embed.flatten = False
        for block in model.blocks:
            block.attn = RelativeBiasAttention(
                net.embed_dim, net.num_heads, qkv_bias=net.qkv_bias, bias_window=net.bias_window
            )
        super().__init__(config, model)

    def embed(self, image: Tensor) -> BranchState:
        """Patch embeddings (B, H', W', C) of an image (B, 3, H, W); positions are biases of the blocks."""
        return BranchState(self.patch_map(image).permute(0, 2, 3, 1))
