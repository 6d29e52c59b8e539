"""A small pyramid and an image to look into."""

import numpy as np
import pytest

from piip_core.visualization import network_input, prepare_scene


@pytest.fixture(scope="session")
def make_scene():
    """Builds a Scene of a noisy image of HEIGHT x WIDTH pixels, resized to a frame of 128 x 128."""

    def make(height: int = 96, width: int = 128, query: tuple[int, int] | None = None, divisor: int = 32):
        original = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, pixel_values = network_input(
            original,
            long_side=128,
            short_side=128,
            pixel_mean=(127.5,) * 3,
            pixel_std=(127.5,) * 3,
            pad_divisor=divisor,
        )
        return prepare_scene((height, width), image, pixel_values, query)

    return make
