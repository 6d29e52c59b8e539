"""Networks of timm by name as branches."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.layers import DropPath
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import BranchConfig
from ..errors import ConfigError
from ..timm_network import TimmConfig
from .base import Branch, BranchState, register_branch
from .convnext import StagedBranch
from .transformer import TransformerBranch
from .window import MapAttention

__all__ = ["TimmTransformerBranch", "create_model", "describe"]

_EXAMPLES = "vit_small_patch16_dinov3, eva02_base_patch14_224, vit_base_patch16_siglip_256, convnextv2_tiny"


def create_model(config: TimmConfig) -> nn.Module:
    """timm's network without final norm, pooling and head, for images of any size.

    Raises:
        ConfigError: If timm has no such model, one of another class, or one that does not take the options.
    """
    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.5)
        known = f"close matches are {', '.join(close)}" if close else f"names are such as {_EXAMPLES}"
        raise ConfigError(f"TimmConfig.name={config.name!r}: timm has no such model; {known}")
    kind = _kind(config)
    options: dict[str, Any] = {"num_classes": 0} | dict(config.options)
    if kind is not ConvNeXt:
        options |= {"global_pool": "", "dynamic_img_size": True}
        if config.patch_size is not None:
            options["patch_size"] = config.patch_size
        if not config.keep_prefix_tokens:
            options |= {"class_token": False, "reg_tokens" if kind is VisionTransformer else "num_reg_tokens": 0}
            if kind is VisionTransformer:
                options["attn_layer"] = MapAttention
    elif config.patch_size is not None:
        raise ConfigError(f"TimmConfig.patch_size={config.patch_size}: expected None for {config.name!r}, a ConvNeXt")
    try:
        model = timm.create_model(config.name, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"TimmConfig: timm cannot build {config.name!r} with {options}: {error}") from error
    for part in ("norm", "fc_norm", "head"):
        if hasattr(model, part):
            setattr(model, part, nn.Identity())
    if kind is ConvNeXt:
        model.norm_pre = nn.Identity()
    return model


def _kind(config: TimmConfig) -> type[nn.Module]:
    """timm's class of a model, from a build without memory."""
    import torch

    with torch.device("meta"):
        found = type(timm.create_model(config.name, pretrained=False, num_classes=0))
    if found not in (VisionTransformer, Eva, ConvNeXt):
        hint = "; BEiTConfig describes BEiT" if found.__name__ == "Beit" else ""
        raise ConfigError(
            f"TimmConfig.name={config.name!r}: timm's class is {found.__name__}; expected VisionTransformer, Eva or "
            f"ConvNeXt, for example {_EXAMPLES}{hint}"
        )
    return found


def describe(model: nn.Module, config: TimmConfig) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Channels and strides after each block, and why there are no windows ("" if there are)."""
    if isinstance(model, ConvNeXt):
        steps = [
            (info["num_chs"], info["reduction"])
            for stage, info in zip(model.stages, model.feature_info, strict=True)
            for _ in range(len(stage.blocks) + (not isinstance(stage.downsample, nn.Identity)))
        ]
        dims, strides = zip(*steps, strict=True)
        return dims, strides, f"{config.name!r} is a ConvNeXt"
    depth, patch = len(model.blocks), model.patch_embed.patch_size[0]
    if isinstance(model, Eva):
        reason = f"{config.name!r} has rotary positions, for global attention alone"
    elif config.keep_prefix_tokens:
        reason = "windows need keep_prefix_tokens=False: class and register tokens belong to no window"
    else:
        reason = ""
    return (model.embed_dim,) * depth, (patch,) * depth, reason


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
        grid, rotary = patches.shape[1:3], None
        sequence = self.model._pos_embed(patches)
        if isinstance(sequence, tuple):
            sequence, rotary = sequence
        sequence = self.model.norm_pre(sequence)
        count = self.model.num_prefix_tokens
        prefix = sequence[:, :count] if count else None
        return BranchState(sequence[:, count:].unflatten(1, grid), prefix, rotary)

    def patch_map(self, image: Tensor) -> Tensor:
        patch = self.strides[0]
        height, width = (side // patch * patch for side in image.shape[-2:])
        return self.model.patch_embed(image[..., :height, :width])

    def run_block(self, state: BranchState, index: int) -> BranchState:
        block = self.model.blocks[index]
        if isinstance(block.attn, MapAttention):  # takes maps, and then windows
            return super().run_block(state, index)
        options = {}
        if state.rotary is not None:
            options["rope"] = state.rotary[index] if getattr(self.model, "rope_mixed", False) else state.rotary
        tokens, prefix = self.split(block(self.sequence(state), **options), state)
        return state._replace(tokens=tokens, prefix=prefix)


@register_branch(TimmConfig)
def _build(config: BranchConfig) -> Branch:
    model = create_model(config.network)
    if not isinstance(model, ConvNeXt):
        return TimmTransformerBranch(config, model)
    branch = StagedBranch(config, model)
    branch.dims, branch.strides = config.network.dims, config.network.strides
    return branch
