"""Visual tokens by ids of their own, so that an engine that knows token ids alone can carry pictures."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from piip_core.errors import ConfigError

__all__ = ["FeatureTable", "Picture"]

_MOST_IDS = 2**31 - 1  # ids are 32 bit integers in transformers' batches


@dataclass(eq=False)
class Picture:
    """A picture that has a place in the table.

    Attributes:
        key: What tells pictures apart, a hash of the content.
        place: Number of its rows' block in the table.
        ids: One for each visual token; no other picture has had them.
        ready: Whether its visual tokens are in the table.
    """

    key: bytes
    place: int
    ids: range
    ready: bool = False
    users: int = field(default=0, repr=False)


class FeatureTable:
    """Visual tokens of the latest pictures, on the model's device.

    Each picture gets ids above the vocabulary, one per visual token. A batch then consists of ids alone: chunks of
    prompts and prompts that start alike (a conversation that goes on, many questions about one picture) are told apart
    and found again by their ids, which would be wrong if all pictures had the same ones. The least recently used
    picture that nobody uses makes room for a new one.

    All methods but `write` belong to one event loop.

    Args:
        embedding: The language model's; gives width, type and device.
        places: Pictures to hold.
        length: Visual tokens of a picture.
        first_id: First id that stands for no word.
    """

    def __init__(self, embedding: nn.Embedding, *, places: int, length: int, first_id: int) -> None:
        self.first_id = first_id
        self.length = length
        self.rows = torch.zeros(places * length, embedding.embedding_dim).to(embedding.weight)
        self._rounds = (_MOST_IDS - first_id) // len(self.rows)
        if self._rounds < 2:
            raise ConfigError(f"image_places={places}: too many for {length} visual tokens each, lower it")
        self._round = [0] * places
        self._free = list(range(places))
        self._pictures: OrderedDict[bytes, Picture] = OrderedDict()  # the least recently used in front
        self._released = asyncio.Condition()
        self._turn = asyncio.Lock()

    @property
    def places(self) -> int:
        """Pictures that have room."""
        return len(self._round)

    @asynccontextmanager
    async def use(self, keys: Sequence[bytes]) -> Any:
        """The pictures with these keys, kept for as long as they are used; waits in turn for room.

        Raises:
            ValueError: If there are more than `places`.
        """
        distinct = list(dict.fromkeys(keys))
        if len(distinct) > self.places:
            raise ValueError(f"{len(distinct)} pictures, the table has room for {self.places}")
        async with self._turn, self._released:
            await self._released.wait_for(lambda: self._has_room(distinct))
            pictures = {key: self._take(key) for key in distinct}
        try:
            yield [pictures[key] for key in keys]
        finally:
            for picture in pictures.values():
                picture.users -= 1
            await asyncio.shield(self._notify())

    def write(self, picture: Picture, tokens: Tensor) -> None:
        """Puts visual tokens (length, width) into the picture's place; from any one thread."""
        start = picture.place * self.length
        self.rows[start : start + self.length] = tokens.to(self.rows)
        picture.ready = True

    def embed(self, embedding: nn.Module, ids: Tensor) -> Tensor:
        """Embeddings (B, N, width) of ids (B, N), those of pictures out of the table."""
        visual = ids >= self.first_id
        rows = (ids - self.first_id).clamp(min=0) % len(self.rows)
        words = embedding(ids.masked_fill(visual, 0))
        return torch.where(visual.unsqueeze(-1), self.rows[rows].to(words.dtype), words)

    def _unused(self) -> Iterator[Picture]:
        return (picture for picture in self._pictures.values() if not picture.users)

    def _has_room(self, keys: Sequence[bytes]) -> bool:
        missing = sum(key not in self._pictures for key in keys)
        spare = sum(picture.key not in keys for picture in self._unused())
        return missing <= len(self._free) + spare

    def _take(self, key: bytes) -> Picture:
        picture = self._pictures.get(key)
        if picture is None:
            picture = self._pictures[key] = self._placed(key)
        self._pictures.move_to_end(key)
        picture.users += 1
        return picture

    def _placed(self, key: bytes) -> Picture:
        if self._free:
            place = self._free.pop()
        else:
            oldest = next(self._unused())
            del self._pictures[oldest.key]
            place = oldest.place
        # A place's ids start anew when 2^31 are used up: after so many pictures nothing remembers the first ones
        self._round[place] = (self._round[place] + 1) % self._rounds
        first = self.first_id + self._round[place] * len(self.rows) + place * self.length
        return Picture(key, place, range(first, first + self.length))

    async def _notify(self) -> None:
        async with self._released:
            self._released.notify_all()
