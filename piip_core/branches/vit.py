"""Plain vision transformers from timm as branches: DeiT, AugReg, MAE, DINOv2, InternViT, CLIP, Uni-Perceiver."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import GELUTanh, QuickGELU, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import BranchConfig
from ..networks import UniPerceiverConfig, ViTConfig
from .base import BranchState, register_branch
from .transformer import TransformerBranch
from .window import FullWidthNormAttention, MapAttention

__all__ = ["UniPerceiverBranch", "ViTBranch"]

_NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": RmsNorm}
_ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}


@register_branch(ViTConfig)
class ViTBranch(TransformerBranch):
    """A timm `VisionTransformer`.

    Position embeddings are stored for `pos_grid` x `pos_grid` patches and resized to the token grid of each input.
    """

    def __init__(self, config: BranchConfig) -> None:
        super().__init__(config)
        net: ViTConfig = config.network
        self.model = _vision_transformer(
            net,
            qkv_bias=net.qkv_bias,
            qk_norm=net.qk_norm,
            init_values=net.layer_scale,
            pre_norm=net.pre_norm,
            class_token=net.class_token,
            no_embed_class=not net.class_position,
            norm_layer=partial(_NORMS[net.norm], eps=net.norm_eps),
            act_layer=_ACTIVATIONS[net.activation],
            attn_layer=FullWidthNormAttention if net.qk_norm else MapAttention,
        )
        self.dims, self.strides = net.dims, net.strides
        _set_windows(self.model, config)
        self._set_drop_path()

    def embed(self, image: Tensor) -> BranchState:
        tokens = self.patch_map(image)
        class_position, grid = self.model.pos_embed.tensor_split([int(self.config.network.class_position)], dim=1)
        tokens = self.model.norm_pre(tokens + self.position_map(grid, *tokens.shape[1:3]))
        if self.model.cls_token is None:
            return BranchState(tokens)
        prefix = self.model.cls_token
        if self.config.network.class_position:
            prefix = prefix + class_position
        return BranchState(tokens, self.model.norm_pre(prefix).expand(tokens.shape[0], -1, -1))


@register_branch(UniPerceiverConfig)
class UniPerceiverBranch(TransformerBranch):
    """The image encoder of Uni-Perceiver as a timm `VisionTransformer`, with a frame table and a norm before block 0.

    An image is frame 0. Position embeddings are resized to the token grid of each input.
    """

    def __init__(self, config: BranchConfig) -> None:
        super().__init__(config)
        net: UniPerceiverConfig = config.network
        norm_layer = partial(nn.LayerNorm, eps=net.norm_eps)
        self.model = _vision_transformer(
            net,
            init_values=1.0,  # timm takes 0 for "no layer scale"
            class_token=False,
            no_embed_class=True,
            norm_layer=norm_layer,
            attn_layer=MapAttention,
        )
        self.model.norm_pre = norm_layer(net.embed_dim)
        self.model.frame_embed = nn.Parameter(torch.zeros(net.num_frames, net.embed_dim))
        for block in self.model.blocks:
            for scale in (block.ls1, block.ls2):
                nn.init.constant_(scale.gamma, net.layer_scale)
        self.dims, self.strides = net.dims, net.strides
        _set_windows(self.model, config)
        self._set_drop_path()

    def embed(self, image: Tensor) -> BranchState:
        tokens = self.patch_map(image)
        tokens = tokens + self.position_map(self.model.pos_embed, *tokens.shape[1:3])
        return BranchState(self.model.norm_pre(tokens + self.model.frame_embed[0]))


def _vision_transformer(net: ViTConfig | UniPerceiverConfig, **options: object) -> VisionTransformer:
    """timm's network without final norm and head; maps go in and out of its blocks."""
    return VisionTransformer(
        img_size=net.pos_grid * net.patch_size,
        patch_size=net.patch_size,
        embed_dim=net.embed_dim,
        depth=net.depth,
        num_heads=net.num_heads,
        mlp_ratio=net.mlp_ratio,
        dynamic_img_size=True,
        final_norm=False,
        global_pool="",
        num_classes=0,
        **options,
    )


def _set_windows(model: VisionTransformer, config: BranchConfig) -> None:
    for block, window in zip(model.blocks, config.window_sizes, strict=True):
        block.attn.window_size = window
        block.attn.pad_before_qkv = config.window_padding == "before_qkv"
