import numpy as np
import pytest
import torch

from piip_core.errors import UserError
from piip_core.visualization import network_input, prepare_scene

FRAME = {"long_side": 200, "short_side": 120, "pixel_mean": (1.0, 2.0, 3.0), "pixel_std": (2.0, 4.0, 8.0)}


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [((100, 100), (120, 120), (128, 128)), ((300, 100), (200, 67), (224, 96)), ((480, 640), (120, 160), (128, 160))],
)
def test_network_input_fits_the_frame(size, resized, padded):
    original = np.full((*size, 3), (11, 22, 43), dtype=np.uint8)
    image, pixel_values = network_input(original, pad_divisor=32, **FRAME)
    assert image.shape == (*resized, 3) and tuple(pixel_values.shape) == (1, 3, *padded)
    height, width = resized
    assert (image == original[0, 0]).all()
    inside = pixel_values[0, :, :height, :width]
    torch.testing.assert_close(inside, torch.tensor([5.0, 5.0, 5.0])[:, None, None].expand_as(inside))
    assert pixel_values[..., height:, :].count_nonzero() == 0 and pixel_values[..., width:].count_nonzero() == 0


def test_query_follows_the_resizing():
    original = np.zeros((60, 100, 3), dtype=np.uint8)
    original[30:40, 70:80] = 255
    image, pixel_values = network_input(original, pad_divisor=32, **FRAME)
    scene = prepare_scene((60, 100), image, pixel_values, (75, 35))
    x, y = scene.query
    assert (x, y) == (151, 71)
    assert image[int(y), int(x)].tolist() == [255] * 3 and image[int(y), int(x) - 14].tolist() == [0] * 3
    assert prepare_scene((60, 100), image, pixel_values).query_pixel == (50, 30)


@pytest.mark.parametrize("query", [(100, 5), (5, 60), (-1, 5)])
def test_query_outside_of_the_image(query):
    image, pixel_values = network_input(np.zeros((60, 100, 3), dtype=np.uint8), pad_divisor=32, **FRAME)
    with pytest.raises(UserError, match=r"outside of the image of 100 x 60.*x from 0 to 99 and y from 0 to 59"):
        prepare_scene((60, 100), image, pixel_values, query)
