"""The small three-branch pyramids that learn the digit scenes in minutes: plain, and with a ConvNeXt branch."""

from collections.abc import Sequence

from piip_core.branches import ConvNeXtConfig, ViTConfig
from piip_core.config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig

__all__ = ["NUM_GROUPS", "demo_config", "hybrid_config"]

NUM_GROUPS = 16  # of the group norms in the mergings; has to divide every branch's width

# Branch 1 first: (embed_dim, num_heads, part of the image's side, window_size). As in the large models, the widest
# branch sees the smallest image; the two others attend within windows and get the view of the whole from Branch 1.
_BRANCHES = ((96, 4, 1 / 2, None), (64, 2, 3 / 4, 9), (48, 2, 1, 8))
_PATCH_SIZE = 8  # the digits are small
_SCENE_SIZE = 192


def demo_config(pretrained: Sequence[str | None] = (None, None, None), *, image_size: int = _SCENE_SIZE) -> PIIPConfig:
    """Configuration of the demo's backbone.

    Args:
        pretrained: file of the pretrained weights of each branch, Branch 1 first; None for random ones.
        image_size: side of the images in pixels, a multiple of 32; that of the scenes by default.

    Raises:
        ValueError: `image_size` is not as described.
    """
    if image_size < 32 or image_size % 32:  # all branches have whole patches
        raise ValueError(f"image_size={image_size}: expected a positive multiple of 32")
    branches = zip(_BRANCHES, pretrained, strict=True)
    return PIIPConfig(
        branches=tuple(_vit_branch(*settings, image_size, pretrained=weights) for settings, weights in branches),
        interaction=_interaction(2),
        merging=MergingConfig(out_strides=(4, 8, 16), num_groups=NUM_GROUPS),
    )


def hybrid_config() -> PIIPConfig:
    """The same with a ConvNeXt at the largest image, and intermediate merging: one map per stage of the ConvNeXt."""
    network = ConvNeXtConfig(depths=(1, 1, 2, 1), stage_dims=(32, 64, 96, 128), layer_scale=None)
    return PIIPConfig(
        branches=(
            *(_vit_branch(*settings, _SCENE_SIZE) for settings in _BRANCHES[:2]),
            # the downsampling before a stage runs in the segment of the stage
            BranchConfig(network=network, image_size=_SCENE_SIZE, segments=((0, 0), (1, 2), (3, 5), (6, 7))),
        ),
        interaction=_interaction(4),
        merging=MergingConfig(kind="regular", intermediate_after=(0, 1, 2), num_groups=NUM_GROUPS),
    )


def _vit_branch(
    dim: int, heads: int, part: float, window_size: int | None, largest: int, *, pretrained: str | None = None
) -> BranchConfig:
    size = round(largest * part)
    return BranchConfig(
        network=ViTConfig(
            embed_dim=dim,
            depth=4,
            num_heads=heads,
            patch_size=_PATCH_SIZE,
            pos_grid=size // _PATCH_SIZE,
            layer_scale=None,
        ),
        image_size=size,
        window_size=window_size,
        pretrained=pretrained,
    )


def _interaction(count: int) -> InteractionConfig:
    # The publication's drop path is meant for weeks of training, not for minutes
    return InteractionConfig(num_interactions=count, num_heads=4, drop_path_rate=0.0)
