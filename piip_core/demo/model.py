"""The small three-branch PIIP of the demo; detector and classifier are built on the same one."""

from collections.abc import Sequence

from ..config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from ..networks import ViTConfig

__all__ = ["NUM_GROUPS", "demo_config"]

NUM_GROUPS = 16  # of the group norms in the mergings; has to divide every branch's width

# Branch 1 first: (embed_dim, num_heads, image_size, window_size). As in the large models, the widest branch sees the
# smallest image; the two others attend within windows and get the view of the whole from Branch 1.
_BRANCHES = ((96, 4, 96, None), (64, 2, 144, 9), (48, 2, 192, 8))


def demo_config(pretrained: Sequence[str | None] = (None, None, None)) -> PIIPConfig:
    """Configuration of the demo's backbone.

    Args:
        pretrained: file of the pretrained weights of each branch, Branch 1 first; None for random ones.
    """
    return PIIPConfig(
        branches=tuple(
            BranchConfig(
                # Patches of 8 pixels: the digits are small.
                network=ViTConfig(
                    embed_dim=dim, depth=4, num_heads=heads, patch_size=8, pos_grid=size // 8, layer_scale=None
                ),
                image_size=size,
                window_size=window,
                pretrained=weights,
            )
            for (dim, heads, size, window), weights in zip(_BRANCHES, pretrained, strict=True)
        ),
        # The publication's drop path is meant for weeks of training, not for minutes.
        interaction=InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.0),
        merging=MergingConfig(out_strides=(4, 8, 16), num_groups=NUM_GROUPS),
    )
