"""A classifier in timm's registry that runs in milliseconds."""

import pytest

from piip_core import BranchConfig, ClassifierConfig, InteractionConfig, PIIPConfig, ViTConfig
from piip_core.integrations.timm import register_classifier


def _tiny() -> ClassifierConfig:
    sizes = ((48, 4, 4, 32), (32, 2, 4, 48), (16, 2, 2, 96))
    branches = (
        BranchConfig(
            network=ViTConfig(
                embed_dim=dim,
                depth=depth,
                num_heads=heads,
                patch_size=8,
                pos_grid=side // 8,
                layer_scale=None,
                class_token=True,
                class_position=True,
            ),
            image_size=side,
        )
        for dim, depth, heads, side in sizes
    )
    interaction = InteractionConfig(num_interactions=2, num_heads=4)
    return ClassifierConfig(pyramid=PIIPConfig(branches=tuple(branches), interaction=interaction, merging=None))


@pytest.fixture(scope="session", autouse=True)
def piip_test():
    """Registers it as piip_test: three branches of 4, 2 and 2 blocks."""
    register_classifier("piip_test", _tiny())
