"""Pictures of clients: small before they wait, a few at a time, and the same to the model."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from llava_piip.serve import pictures as pictures_module
from llava_piip.serve.fetching import FetchError, ImageFetcher
from llava_piip.serve.pictures import PictureReader, network_view


@pytest.mark.parametrize("size", [(64, 48), (37, 211), (300, 300), (5, 7)])
def test_a_picture_as_the_model_sees_it_is_the_same_to_the_model(tiny_chat, size):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    processor = tiny_chat.processor.image_processor
    kept = network_view(tiny_chat, picture)
    assert kept.size == (64, 64)
    direct, again = (processor(images=[image], return_tensors="pt")["pixel_values"] for image in (picture, kept))
    assert torch.equal(direct, again)


def test_few_are_large_at_a_time(tiny_chat, pictures, data_uri, monkeypatch):
    """8 pictures of each of 12 requests, 40 million pixels each, would take 15 GB."""
    large, most, lock, decode = 0, 0, threading.Lock(), pictures_module.decode_image

    def counted(*arguments, **options):
        nonlocal large, most
        with lock:
            large += 1
            most = max(most, large)
        time.sleep(0.01)
        return decode(*arguments, **options)

    def leaving(chat, image):
        nonlocal large
        small = network_view(chat, image)
        with lock:
            large -= 1
        return small

    monkeypatch.setattr(pictures_module, "decode_image", counted)
    monkeypatch.setattr(pictures_module, "network_view", leaving)
    asked = [("here", data_uri(picture)) for picture in pictures[:8]]

    async def main():
        reader = PictureReader(tiny_chat, ImageFetcher())
        found = await asyncio.gather(*(reader.read(asked) for _ in range(12)))
        reader.close()
        return found

    expected = [np.asarray(network_view(tiny_chat, picture)) for picture in pictures[:8]]
    for request in asyncio.run(main()):
        assert all(np.array_equal(image, other) for image, other in zip(request, expected, strict=True))
    assert 1 < most <= 4 and large == 0


def test_picture_that_becomes_too_large_on_the_way_names_its_field(tiny_chat, data_uri, monkeypatch):
    tiny_chat.processor.image_processor.pad_to_square = False  # its short side would be stretched to the model's size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    thin = data_uri(Image.new("RGB", (8000, 1)))
    with pytest.raises(FetchError, match=r"there\.url: .*crop the image first") as caught:
        asyncio.run(PictureReader(tiny_chat, ImageFetcher()).read([("there.url", thin)]))
    assert caught.value.field == "there.url"
