"""Conversations about images as a torch dataset, and batches of its samples."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, get_worker_info

from piip_core.errors import ConfigError, check_choice

from ..conversation import IGNORE_INDEX, ConversationError
from ..image_processing import ImageError
from .images import ImageFolder
from .records import DataError, Problem, Record

if TYPE_CHECKING:
    from ..processing import PIIPLlavaProcessor

_log = logging.getLogger(__name__)

_IMAGE_WORDS = 128  # what the published `lengths` count an image as
_MOST_SKIPPED_IN_A_ROW = 100
_CUT = "conversations cut"
_COUNTED = (*(problem.value for problem in Problem), _CUT)
_MAX_WORKERS = 128

Folder = str | os.PathLike[str]


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Samples for training: `input_ids` (N,) and `labels` (N,) int64, `pixel_values` (images, 3, S, S) float32.

    Images with their own aspect ratio also have `image_sizes` (images, 2) int64; see `PIIPImageProcessor`. Text-only
    samples have no `pixel_values`. Images are read when a sample is asked for. Entries with one image follow LLaVA's
    rule for the placeholder `<image>` (it moves to the front of its message); in entries with several images the
    placeholders stay where they are written, one for each image. Without images the tag is ordinary text, but a message
    that starts or ends with a line of nothing else is taken for a forgotten field `image`.

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
        ConfigError: If a folder does not exist or `on_error` is unknown.
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
        check_choice("on_error", on_error, ("raise", "skip"))
        self.records, self.processor = records, processor
        self.chat_template, self.max_length, self.on_error = chat_template, max_length, on_error
        self._as_viewed = as_viewed
        roots = image_root if isinstance(image_root, Mapping) else {None: image_root} if image_root is not None else {}
        self._folders = {
            source and str(Path(source)): ImageFolder(root, follow_links=follow_links) for source, root in roots.items()
        }
        # In shared memory: a row for this process and one for each worker of a DataLoader
        self._counts = torch.zeros(1 + _MAX_WORKERS, len(_COUNTED), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample, or what stands in for it; a DataError if it cannot be used, or a hundred in a row cannot."""
        number = range(len(self))[index]
        if self.on_error == "raise":
            return self._sample(self.records[number])
        errors = []
        for record in self._stand_ins(number):
            try:
                return self._sample(record)
            except DataError as error:
                errors.append(error)
                if self._count(error.problem.value) == 1:
                    kind = error.problem.value
                    _log.warning("Sample skipped (%s; further ones are only counted): %s", kind, error)
        raise DataError(
            f"{errors[0]}; none of {len(errors)} entries from this one on can be used; is the image folder right?",
            errors[0].problem,
        )

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were skipped for which reason, by this process and its `DataLoader` workers."""
        counts = {problem.value: self._total(problem.value) for problem in Problem}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def conversations_cut(self) -> int:
        """How many times a conversation longer than `max_length` was cut."""
        return self._total(_CUT)

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
        messages, has_images = record.messages(), bool(record.images)
        options, pixels = {}, {}
        if self.processor.token_size is not None and has_images:  # the number of ids depends on the sizes
            pixels = self._pixels(record, record.images)
            options["image_sizes"] = pixels["image_sizes"]
        try:
            encoded = self.processor.encode_conversation(
                messages, chat_template=self.chat_template, max_length=self.max_length, has_images=has_images, **options
            )
        except ConversationError as error:
            raise DataError(f"{record.where}: {error}", Problem.CONVERSATION) from error
        sample = {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)}
        # Rounds that were cut took their placeholders with them
        if encoded.num_images:
            pixels = pixels or self._pixels(record, record.images[: encoded.num_images])
            sample |= {name: values[: encoded.num_images] for name, values in pixels.items()}
        if encoded.turns_cut and self._count(_CUT) == 1:
            message = "%s: longer than %s ids, %d rounds cut from its end (further ones are only counted)"
            _log.warning(message, record.where, self.max_length, encoded.turns_cut)
        return sample

    def _pixels(self, record: Record, names: Sequence[str]) -> dict[str, Tensor]:
        images = [self._image(record, name) for name in names]
        try:
            return dict(self.processor.image_processor(images=images, return_tensors="pt"))
        except ImageError as error:
            raise DataError(f"{record.where}: {error}", Problem.UNUSABLE) from error

    def _image(self, record: Record, name: str) -> Image.Image:
        folder = self._folders.get(None) or self._folders.get(record.source)
        if folder is None:  # a mistake of the program and not of the entry: never skipped
            known = ", ".join(map(repr, self._folders)) or "none"
            raise ConfigError(f"{record.where} has images, but no image_root was given for its file (given: {known})")
        try:
            return folder.open(name, as_viewed=self._as_viewed)
        except DataError as error:
            raise DataError(f"{record.where}: {error}", error.problem) from error

    def _count(self, name: str) -> int:
        """Counts one more, and returns what this worker or process has counted of it."""
        worker = get_worker_info()
        count = self._counts[0 if worker is None else 1 + worker.id % _MAX_WORKERS, _COUNTED.index(name)]
        count += 1
        return int(count)

    def _total(self, name: str) -> int:
        return int(self._counts[:, _COUNTED.index(name)].sum())


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest of them and puts their images one after the other.

    A batch has `input_ids` and `labels` (B, N) int64, `attention_mask` (B, N) int64, and `pixel_values` (images of the
    whole batch, 3, S, S) in the order of the samples, if there are images at all: text-only samples contribute none.
    Images with their own aspect ratio are padded, and have `image_sizes` (images, 2). The mask comes from the lengths,
    so an id that happens to be that of the padding stays visible inside of a text.

    Attributes:
        pad_token_id: Id of the padding; labels there are -100.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Makes a batch of items of `ConversationDataset`."""
        if not samples:
            raise DataError("a batch of no samples: expected at least one")
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence([sample["labels"] for sample in samples], True, IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        seen = [sample for sample in samples if "pixel_values" in sample]
        if not seen:
            return batch
        if "image_sizes" in seen[0]:
            batch["image_sizes"] = torch.cat([sample["image_sizes"] for sample in seen])
        images = [sample["pixel_values"] for sample in seen]
        height, width = (max(image.shape[axis] for image in images) for axis in (2, 3))
        padded = [F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2])) for image in images]
        return batch | {"pixel_values": torch.cat(padded)}
