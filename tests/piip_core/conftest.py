"""Small pyramids that the tests of the method share."""

import random
import struct

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


def _mutated(content: bytes, seed: int) -> bytes:
    """One to three changes: bits, bytes, pieces that are lost or doubled; often near an end, where headers are."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        size = len(data)
        at = rng.choice((rng.randrange(size), rng.randrange(min(400, size)), size - 1 - rng.randrange(min(400, size))))
        length = rng.choice((1, 4, 50, size // 3))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(len(data[at : at + length]))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data = data[: max(1, at)]
            case 5:
                data[at : at + 8] = struct.pack("<q", rng.choice((0, -1, 2**31, 2**62, 10**12)))[: len(data) - at]
            case 6:
                data[at : at + 4] = b"\xff" * len(data[at : at + 4])
        data = data or bytearray(1)
    return bytes(data)


@pytest.fixture(name="mutated", scope="session")
def mutated_fixture():
    """Damages the content of a file; see `_mutated`."""
    return _mutated
