"""Plain vision transformers from timm as branches: DeiT, AugReg, MAE, DINOv2, InternViT, CLIP, Uni-Perceiver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from timm.layers import GELUTanh, LayerScale, QuickGELU, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import check, check_choice
from .base import BranchConfig, BranchState, register_branch
from .transformer import FullWidthNormAttention, MapAttention, PlainTransformerConfig, TransformerBranch

_NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": RmsNorm}
_ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}


@dataclass(frozen=True, kw_only=True)
class ViTConfig(PlainTransformerConfig):
    """Plain vision transformer (DeiT, AugReg, MAE, DINOv2, InternViT, CLIP): pre-norm blocks, learned positions.

    Sizes are as in `PlainTransformerConfig`.

    Args:
        qkv_bias: Bias of the joint query-key-value linear.
        pos_grid: Side of the square grid of the learned position table, in patches.
        layer_scale: Initial value of the per-channel residual scales; None for a network without them.
        norm: "layernorm", or "rmsnorm" (InternViT-6B).
        qk_norm: Normalise queries and keys over the full width, all heads together (InternViT-6B).
        activation: "gelu"; "gelu_tanh", its approximation in the fused MLP of some published models; "quick_gelu", its
            approximation in OpenAI's CLIP.
        pre_norm: A norm before block 0, and no bias in the patch convolution (CLIP).
        class_token: Prepend a class token. It takes part in self-attention only: interactions and merging see
            patch tokens. It needs global attention, so no window sizes.
        class_position: The class token has an entry in the position table, the first one (CLIP).
    """

    family: ClassVar[str] = "vit"

    qkv_bias: bool = True
    pos_grid: int = 14
    layer_scale: float | None = 1.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    qk_norm: bool = False
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    pre_norm: bool = False
    class_token: bool = False
    class_position: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ViTConfig.norm", self.norm, tuple(_NORMS))
        check_choice("ViTConfig.activation", self.activation, tuple(_ACTIVATIONS))
        possible = self.class_token or not self.class_position
        check(possible, "ViTConfig.class_position", self.class_position, "False for a network with class_token=False")
        if self.class_token:
            self.set_blocks(self.dims, self.strides, no_windows="a class token (class_token=True) belongs to no window")


@register_branch(ViTConfig)
class ViTBranch(TransformerBranch):
    """A timm `VisionTransformer`.

    Position embeddings are stored for `pos_grid` x `pos_grid` patches and resized to the token grid of each input.
    """

    model: VisionTransformer

    def __init__(self, config: BranchConfig[ViTConfig]) -> None:
        net = config.network
        model = _vision_transformer(
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
        super().__init__(config, model)

    def embed(self, image: Tensor) -> BranchState:
        """Patches of an image (B, 3, H, W) with positions and the class token as prefix; normalised with `pre_norm`."""
        tokens = self.patch_map(image)
        assert self.model.pos_embed is not None
        class_position, grid = self.model.pos_embed.tensor_split([int(self.config.network.class_position)], dim=1)
        tokens = self.model.norm_pre(tokens + self.position_map(grid, *tokens.shape[1:3]))
        prefix: Tensor | None = self.model.cls_token
        if prefix is None:
            return BranchState(tokens)
        if self.config.network.class_position:
            prefix = prefix + class_position
        return BranchState(tokens, self.model.norm_pre(prefix).expand(tokens.shape[0], -1, -1))


@dataclass(frozen=True, kw_only=True)
class UniPerceiverConfig(PlainTransformerConfig):
    """Image branch of Uni-Perceiver: embeddings for positions and frames, a norm after them, pre-norm blocks.

    Sizes are as in `PlainTransformerConfig`.

    Args:
        pos_grid: Side of the square grid of the learned position table, in patches.
        num_frames: Entries of the frame table; an image is frame 0.
        layer_scale: Initial value of the per-channel residual scales.
    """

    family: ClassVar[str] = "uniperceiver"

    pos_grid: int = 14
    num_frames: int = 8
    layer_scale: float = 0.0
    norm_eps: float = 1e-5


@register_branch(UniPerceiverConfig)
class UniPerceiverBranch(TransformerBranch):
    """The image encoder of Uni-Perceiver as a timm `VisionTransformer`, with a frame table and a norm before block 0.

    An image is frame 0. Position embeddings are resized to the token grid of each input.
    """

    model: VisionTransformer

    def __init__(self, config: BranchConfig[UniPerceiverConfig]) -> None:
        net = config.network
        norm_layer = partial(nn.LayerNorm, eps=net.norm_eps)
        model = _vision_transformer(
            net,
            init_values=1.0,  # timm takes 0 for "no layer scale"
            class_token=False,
            no_embed_class=True,
            norm_layer=norm_layer,
            attn_layer=MapAttention,
        )
        model.norm_pre = norm_layer(net.embed_dim)
        model.frame_embed = nn.Parameter(torch.zeros(net.num_frames, net.embed_dim))
        for module in model.modules():
            if isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, net.layer_scale)
        super().__init__(config, model)

    def embed(self, image: Tensor) -> BranchState:
        """Patches of an image (B, 3, H, W) with positions and the embedding of frame 0, normalised."""
        assert isinstance(self.model.pos_embed, Tensor) and isinstance(self.model.frame_embed, Tensor)
        tokens = self.patch_map(image)
        tokens = tokens + self.position_map(self.model.pos_embed, *tokens.shape[1:3])
        return BranchState(self.model.norm_pre(tokens + self.model.frame_embed[0]))


def _vision_transformer(net: ViTConfig | UniPerceiverConfig, **options: Any) -> VisionTransformer:
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
