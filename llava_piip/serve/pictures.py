"""Pictures of clients, made as small as the model needs them before they wait for it.

A decoded picture can be a thousand times larger than its file: those of all requests that wait would not fit into
memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image

from ..image_processing import ImageError
from .fetching import FetchError, ImageFetcher, decode_image
from .generation import ChatModel

__all__ = ["PictureReader", "network_view", "prepare_picture"]

_FETCHING = 16  # at a time, those among them that wait to be decoded
_DECODING = 4  # at a time: the largest take 0.6 GB until they are small, which their thread's heap may keep


class PictureReader:
    """Gets the pictures of requests, as the model sees them.

    Args:
        chat: The model.
        fetcher: Gets their files.
    """

    def __init__(self, chat: ChatModel, fetcher: ImageFetcher) -> None:
        self._chat, self._fetcher = chat, fetcher
        self._places = asyncio.Semaphore(_FETCHING)
        self._fetching = ThreadPoolExecutor(_FETCHING, "fetch")
        self._decoding = ThreadPoolExecutor(_DECODING, "decode")

    async def read(self, addresses: Sequence[tuple[str, str]]) -> list[Image.Image]:
        """The pictures of one request.

        Args:
            addresses: Field and address of each; see `ImageFetcher.fetch`.

        Raises:
            FetchError: If there are too many, or one cannot be had.
        """
        self._fetcher.check_count(len(addresses))
        return await asyncio.gather(*(self._read(field, url) for field, url in addresses))

    def close(self) -> None:
        """Lets the threads go."""
        for threads in (self._fetching, self._decoding):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _read(self, field: str, url: str) -> Image.Image:
        loop = asyncio.get_running_loop()
        async with self._places:
            data = await loop.run_in_executor(self._fetching, partial(self._fetcher.read, url, field=field))
            return await loop.run_in_executor(self._decoding, self._small, data, field)

    def _small(self, data: bytes, field: str) -> Image.Image:
        image = decode_image(data, field=field, policy=self._fetcher.policy)
        try:
            return network_view(self._chat, image)
        except ImageError as error:
            raise FetchError(field, str(error)) from None


def network_view(chat: ChatModel, image: Image.Image) -> Image.Image:
    """A picture as the vision tower gets it: a square of its size, which is the same to the model."""
    return Image.fromarray(prepare_picture(chat, image)[0])


def prepare_picture(chat: ChatModel, image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
    """What the tower gets, as a picture (S, S, 3) uint8 and as values (1, 3, S, S)."""
    processor = chat.processor.image_processor
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = ((pixels[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return shown.permute(1, 2, 0).numpy(), pixels
