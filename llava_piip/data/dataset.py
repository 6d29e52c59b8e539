"""Conversations about images as a torch dataset; see `ConversationDataset`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from piip_core.errors import ConfigError

from ..conversation import IMAGE_TAG, ConversationError, EncodedConversation, messages_from_llava
from ..image_processing import ImageError
from .images import ImageFolder
from .problems import DataError, Problem, SharedCounts
from .records import Record

if TYPE_CHECKING:
    from ..processing import PIIPLlavaProcessor

__all__ = ["ConversationDataset", "count_placeholders", "is_placeholder"]

_log = logging.getLogger(__name__)

_IMAGE_WORDS = 128  # what the published `lengths` count an image as
_MOST_SKIPPED_IN_A_ROW = 100
_TURNS_CUT, _CONVERSATIONS_CUT = "turns cut", "conversations cut"

Folder = str | os.PathLike[str]


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Samples for training: `input_ids` (N,) and `labels` (N,) int64, `pixel_values` (images, 3, S, S) float32.

    Text-only samples have no `pixel_values`. Images are read when a sample is asked for. Entries with one image follow
    LLaVA's rule for the placeholder `<image>` (it moves to the front of its message); in entries with several images
    the placeholders stay where they are written, one for each image. Without images the tag is ordinary text, but a
    message that starts or ends with a line of nothing else is taken for a forgotten field `image`.

    Conversations that do not fit into `max_length` lose whole rounds at their end, which is counted.

    Args:
        records: The entries, of `read_records`.
        processor: Turns messages into ids and images into pixels.
        image_root: The folder that image names are relative to, or one per source file of the records.
        chat_template: Name or text of a template, instead of the processor's own.
        max_length: Most ids of a sample, those of its images included; None for any number.
        on_error: "raise" stops at an unusable sample. "skip" counts it and takes the next usable one of the same kind
            (with images or without) instead; equal in every run.
        follow_links: Whether links below the image folder may lead out of it; see `ImageFolder`.
        as_viewed: Whether images are taken as viewers show them; see `llava_piip.data.images.viewed_image`.

    Raises:
        ConfigError: If there are no records, a folder does not exist or a setting is unknown.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: PIIPLlavaProcessor,
        image_root: Folder | Mapping[str, Folder] | None = None,
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        follow_links: bool = False,
        as_viewed: bool = False,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"ConversationDataset.on_error is {on_error!r}: expected 'raise' or 'skip'")
        if not len(records):
            raise ConfigError("ConversationDataset.records is empty: expected at least one entry")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"ConversationDataset.max_length is {max_length}: expected a number of ids or None")
        self.records, self.processor = records, processor
        self.chat_template, self.max_length, self.on_error = chat_template, max_length, on_error
        self._as_viewed = as_viewed
        roots = image_root if isinstance(image_root, Mapping) else {None: image_root} if image_root is not None else {}
        self._folders = {
            source and str(Path(source)): ImageFolder(root, follow_links=follow_links) for source, root in roots.items()
        }
        self._counts = SharedCounts([problem.value for problem in Problem] + [_TURNS_CUT, _CONVERSATIONS_CUT])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample, or what stands in for it.

        Raises:
            IndexError: If there is no entry of that number.
            DataError: If the sample is unusable and not to be skipped, or a hundred in a row are unusable.
        """
        number = range(len(self))[index]
        if self.on_error == "raise":
            return self._sample(self.records[number])
        errors = []
        for record in self._stand_ins(number):
            try:
                return self._sample(record)
            except DataError as error:
                errors.append(error)
                if self._counts.add(error.problem.value) == 1:
                    kind = error.problem.value
                    _log.warning("Sample skipped (%s; further ones are only counted): %s", kind, error)
        raise DataError(
            f"{errors[0]}; none of {len(errors)} entries from this one on can be used; is the image folder right?",
            errors[0].problem,
        )

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were skipped for which reason, by this process and its `DataLoader` workers."""
        return {problem.value: self._counts[problem.value] for problem in Problem if self._counts[problem.value]}

    @property
    def turns_cut(self) -> int:
        """How many rounds (question and answer) were cut from conversations longer than `max_length`."""
        return self._counts[_TURNS_CUT]

    @property
    def conversations_cut(self) -> int:
        """How many times a conversation longer than `max_length` was cut."""
        return self._counts[_CONVERSATIONS_CUT]

    @cached_property
    def modality_lengths(self) -> list[int]:
        """Number of words of each conversation, negative for text only, for `ModalityLengthSampler`.

        Raises:
            DataError: If a conversation has no words and is not to be skipped.
        """
        return [self._num_words(record) * (1 if record.images else -1) for record in self.records]

    @cached_property
    def lengths(self) -> list[int]:
        """Number of words of each conversation, plus 128 if it has images, as LLaVA estimates lengths."""
        return [abs(words) + (_IMAGE_WORDS if words > 0 else 0) for words in self.modality_lengths]

    def _num_words(self, record: Record) -> int:
        words = sum(len(turn["value"].split()) for turn in record.conversations)
        if words == 0 and self.on_error == "raise":
            raise DataError(f"{record.where}: the conversation has no words; remove the entry", Problem.CONVERSATION)
        return max(words, 1)

    def _stand_ins(self, number: int) -> Iterator[Record]:
        """The record, then those after it with images if it has some, without if not; around the end."""
        kind = bool(self.records[number].images)
        others = (self.records[(number + step) % len(self)] for step in range(len(self)))
        return islice((other for other in others if bool(other.images) == kind), _MOST_SKIPPED_IN_A_ROW)

    def _sample(self, record: Record) -> dict[str, Tensor]:
        encoded = self._encoded(record)
        sample = {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)}
        # Rounds that were cut took their placeholders with them
        images = [self._image(record, name) for name in record.images[: encoded.num_images]]
        if images:
            try:
                pixels = self.processor.image_processor(images=images, return_tensors="pt")
                sample["pixel_values"] = pixels["pixel_values"]
            except ImageError as error:
                raise DataError(f"{record.where}: {error}", Problem.UNUSABLE) from error
        if encoded.turns_cut:
            self._count_cut(record, encoded.turns_cut)
        return sample

    def _encoded(self, record: Record) -> EncodedConversation:
        num_images = len(record.images)
        try:
            messages = messages_from_llava(record.conversations, has_image=num_images == 1)
            encoded = self.processor.encode_conversation(
                messages, chat_template=self.chat_template, max_length=self.max_length, has_images=num_images > 0
            )
        except ConversationError as error:
            raise DataError(f"{record.where}: {error}", Problem.CONVERSATION) from error
        found = encoded.num_images
        if encoded.turns_cut or not num_images:
            found = count_placeholders(messages, has_images=num_images > 0)
        if found != num_images:
            raise DataError(
                f"{record.where}: {found} placeholders {IMAGE_TAG} in the text and {num_images} images in the field "
                "'image', expected one placeholder for each image; correct the entry",
                Problem.PLACEHOLDERS,
            )
        return encoded

    def _image(self, record: Record, name: str) -> Image.Image:
        folder = self._folders.get(None) or self._folders.get(record.source)
        if folder is None:  # a mistake of the program and not of the entry: never skipped
            known = ", ".join(map(repr, self._folders)) or "none"
            raise ConfigError(f"{record.where} has images, but no image_root was given for its file (given: {known})")
        try:
            return folder.open(name, as_viewed=self._as_viewed)
        except DataError as error:
            raise DataError(f"{record.where}: {error}", error.problem) from error

    def _count_cut(self, record: Record, turns: int) -> None:
        self._counts.add(_TURNS_CUT, turns)
        if self._counts.add(_CONVERSATIONS_CUT) == 1:
            message = "%s: longer than %s ids, %d rounds cut from its end (further ones are only counted)"
            _log.warning(message, record.where, self.max_length, turns)


def count_placeholders(messages: Iterable[Mapping[str, str]], *, has_images: bool) -> int:
    """Placeholders of an entry; without images, the tag within a text is ordinary."""
    texts = [message["content"] for message in messages]
    return sum(text.count(IMAGE_TAG) for text in texts) if has_images else sum(map(is_placeholder, texts))


def is_placeholder(text: str) -> bool:
    """Whether a message of an entry without images looks as if an image belongs to it: a line of the tag at an end."""
    return text == IMAGE_TAG or text.startswith(IMAGE_TAG + "\n") or text.endswith("\n" + IMAGE_TAG)
