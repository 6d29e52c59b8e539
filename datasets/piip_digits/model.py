"""The small three-branch pyramids that learn the digit scenes in minutes: plain, and with a ConvNeXt branch."""

from piip_core.branches import ConvNeXtConfig, ViTConfig
from piip_core.config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig

NUM_GROUPS = 16  # of the group norms in the mergings; has to divide every branch's width

# Branch 1 first: (embed_dim, num_heads, part of the image's side, window_size). As in the large models, the widest
# branch sees the smallest image; the two others attend within windows and get the view of the whole from Branch 1.
_BRANCHES = ((96, 4, 1 / 2, None), (64, 2, 3 / 4, 9), (48, 2, 1, 8))
_PATCH_SIZE = 8  # the digits are small
_SCENE_SIZE = 192


def demo_config(*, image_size: int = _SCENE_SIZE) -> PIIPConfig:
    """The demo's backbone for images of so many pixels a side, a multiple of 32: all branches have whole patches."""
    branches = []
    for dim, heads, part, window_size in _BRANCHES:
        size = round(image_size * part)
        sizes = dict(embed_dim=dim, num_heads=heads, patch_size=_PATCH_SIZE, pos_grid=size // _PATCH_SIZE)
        network = ViTConfig(depth=4, layer_scale=None, **sizes)
        branches.append(BranchConfig(network=network, image_size=size, window_size=window_size))
    return PIIPConfig(
        branches=tuple(branches),
        interaction=_interaction(2),
        merging=MergingConfig(out_strides=(4, 8, 16), num_groups=NUM_GROUPS),
    )


def hybrid_config() -> PIIPConfig:
    """The same with a ConvNeXt at the largest image, and intermediate merging: one map per stage of the ConvNeXt."""
    network = ConvNeXtConfig(depths=(1, 1, 2, 1), stage_dims=(32, 64, 96, 128), layer_scale=None)
    # The downsampling before a stage runs in the segment of the stage
    convnext = BranchConfig(network=network, image_size=_SCENE_SIZE, segments=((0, 0), (1, 2), (3, 5), (6, 7)))
    return PIIPConfig(
        branches=(*demo_config().branches[:2], convnext),
        interaction=_interaction(4),
        merging=MergingConfig(kind="regular", intermediate_after=(0, 1, 2), num_groups=NUM_GROUPS),
    )


def _interaction(count: int) -> InteractionConfig:
    # The publication's drop path is meant for weeks of training, not for minutes
    return InteractionConfig(num_interactions=count, num_heads=4, drop_path_rate=0.0)
