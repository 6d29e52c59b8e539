"""Small pyramids that the tests of the method share."""

import pytest

from piip_core import BranchConfig, DensePIIP, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig

SIMPLE = MergingConfig()


def tiny_branch(embed_dim: int, image_size: int, depth: int = 2, **options) -> BranchConfig:
    network = ViTConfig(embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 8, pos_grid=4)
    return BranchConfig(network=network, image_size=image_size, **options)


def tiny_config(dims=(32, 24, 16), sizes=(64, 96, 128), interaction=None, merging=SIMPLE, **options) -> PIIPConfig:
    interaction = interaction or InteractionConfig(num_interactions=2, num_heads=4)
    branches = tuple(tiny_branch(dim, size, **options) for dim, size in zip(dims, sizes, strict=True))
    return PIIPConfig(branches=branches, interaction=interaction, merging=merging)


@pytest.fixture(name="tiny_config", scope="session")
def tiny_config_fixture():
    """Builds a small PIIPConfig; see `tiny_config`."""
    return tiny_config


@pytest.fixture(name="tiny_branch", scope="session")
def tiny_branch_fixture():
    """Builds a small BranchConfig; see `tiny_branch`."""
    return tiny_branch


@pytest.fixture
def tiny_model(randomize) -> DensePIIP:
    """A three-branch model with windows, every parameter random."""
    return randomize(DensePIIP(tiny_config(window_size=3))).eval()
