"""Cases of training data: samples and batches out of records, and the order of the samples."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from piip_core.verification import Check, GoldenCase

from ..conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from ..data import Collator, ConversationDataset, DataError, Problem, read_records
from ..data.sampler import group_by_length, group_by_modality
from ..image_processing import PIIPImageProcessor
from ..tokenization import encode_text
from .text import PUBLIC_IMAGE_ID, llama_tokenizer

__all__ = ["verify_collate", "verify_sampler"]

_IMAGE_SIZE = 32
_MISSING = "vg/missing.png"  # the one file that the public run did not find


def verify_sampler(case: GoldenCase) -> Check:
    """Orders of samples, index by index, with the public run's two sources of randomness."""
    check = Check(case)
    for number, entry in enumerate(case.info["cases"]):
        shuffle, order = (Generator().manual_seed(entry[f"{name}_seed"]) for name in ("global", "generator"))
        sizes = entry["lengths"], entry["batch_size"], entry["world_size"]
        try:
            if entry["group_by_modality"]:
                indices = group_by_modality(*sizes, order, shuffle_generator=shuffle)
            else:
                indices = group_by_length(*sizes, order)
        except DataError:
            _true(check, f"output.{number}.exception", "exception" in entry)
        else:
            check.equal(f"output.{number}.indices", torch.tensor(indices), torch.tensor(entry.get("indices", [])))
    return check


def verify_collate(case: GoldenCase) -> Check:
    """Samples and batches, and the lengths of all samples.

    Equal: ids, labels, padding, and the images of samples that have one. Different on purpose:

    - an image is as many ids as it has tokens (here one, of another id), not one placeholder of -200;
    - text-only samples bring no image, where the public code puts one of zeros;
    - an unreadable image is an error of its sample, or is replaced, where the public code drops it from the batch, and
      with it all other images if it comes first;
    - the mask hides padding alone, where the public code hides a literal "<unk>" too, and then has no labels at all;
    - a conversation is cut between rounds or refused, where the public code cuts through an answer;
    - a conversation without an answer is refused, where the public code trains with no labels.
    """
    check = Check(case)
    tokenizer_file = case.path.parent / case.info["tokenizer_file"]
    with (
        tempfile.TemporaryDirectory() as folder,
        llama_tokenizer(tokenizer_file, legacy=case.info["legacy"]) as tokenizer,
    ):
        path = _write_samples(Path(folder), case.info["samples"])
        processor = _Processor(tokenizer, len(tokenizer), PIIPImageProcessor(size=_IMAGE_SIZE, pad_to_square=True))
        dataset = ConversationDataset(read_records(path), processor, folder)
        for name in ("lengths", "modality_lengths"):
            check.equal(f"output.{name}", torch.tensor(getattr(dataset, name)), torch.tensor(case.info[name]))
        for number, batch in enumerate(case.info["batches"]):
            _verify_batch(check, f"output.{number}", dataset, batch)
        limit = case.info["model_max_length"]
        _verify_limit(check, dataset, ConversationDataset(dataset.records, processor, folder, max_length=limit))
    return check


@dataclass(frozen=True)
class _Processor:
    """What a dataset needs of a processor, for a tokenizer and one token per image."""

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    image_processor: PIIPImageProcessor

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
        has_images: bool = True,
    ) -> EncodedConversation:
        return encode_conversation(
            self.tokenizer,
            messages,
            chat_template=chat_template or "vicuna_v1",
            image_token_id=self.image_token_id,
            image_seq_length=1,
            max_length=max_length,
            has_images=has_images,
        )


def _write_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """The records and their images, each of another gray and none of them what a normalised zero would be."""
    for number, sample in enumerate(samples):
        name = sample.get("image", _MISSING)
        if name != _MISSING:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 10), 20 * number + 10).save(folder / name)
    path = folder / "samples.json"
    path.write_text(json.dumps(samples))
    return path


def _verify_batch(check: Check, name: str, dataset: ConversationDataset, batch: Mapping[str, Any]) -> None:
    """One batch: the samples that can be used, against the public rows of them."""
    samples = [_sample_or_problem(dataset, index) for index in batch["indices"]]
    readable = [
        (index, sample)
        for index, sample in zip(batch["indices"], samples, strict=True)
        if sample is not Problem.MISSING
    ]
    missing = batch["printed"].count("ERROR <file not found>")
    check.equal(f"{name}.missing", torch.tensor(len(samples) - len(readable)), torch.tensor(missing))
    if "exception" in batch:
        _true(check, f"{name}.exception", not readable and _refused(lambda: Collator(0)([])))
        return

    rows = [_PublicRow.of(batch, row, dataset) for row in range(len(batch["input_ids"]))]
    _true(check, f"{name}.rows", len(rows) == len(readable))
    pairs = []
    for (index, sample), row in zip(readable, rows, strict=True):
        if isinstance(sample, Problem):  # no answer: the public row has labels nowhere, and no end token
            refused = sample is Problem.CONVERSATION and not row.answers().any()
            _true(check, f"{name}.refused.{index}", refused and not (row.labels != IGNORE_INDEX).any())
        else:
            pairs.append((sample, row))
    _compare(check, name, dataset, batch, pairs)


@dataclass(frozen=True)
class _PublicRow:
    """A row of a public batch without its padding."""

    ids: Tensor
    labels: Tensor
    mask: Tensor
    has_image: bool | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, batch: Mapping[str, Any], row: int, dataset: ConversationDataset) -> _PublicRow:
        processor = dataset.processor
        ids = torch.tensor(batch["input_ids"][row])
        length = int(ids.nonzero().max()) + 1  # the padding id is 0; all texts end in another one
        ids = torch.where(ids == PUBLIC_IMAGE_ID, processor.image_token_id, ids)[:length]
        labels, mask = (torch.tensor(batch[key][row])[:length] for key in ("labels", "attention_mask"))
        has_image = not batch["image_is_zero"][row] if batch["has_images"] else None
        return cls(ids, labels, mask, has_image, processor.tokenizer)

    def answers(self) -> Tensor:
        """Where answers are: from the id after each "ASSISTANT:" to the next end token."""
        role, _ = encode_text(self.tokenizer, "ASSISTANT:")
        found, inside = torch.zeros(len(self.ids), dtype=torch.bool), False
        for place, token in enumerate(self.ids.tolist()):
            found[place] = inside
            ended = token == self.tokenizer.eos_token_id
            inside = (inside or self.ids[: place + 1][-len(role) :].tolist() == role) and not ended
        return found

    def expected_labels(self) -> Tensor:
        """The public labels; where the public count of tokens went wrong and left none, the answers."""
        if (self.labels != IGNORE_INDEX).any():
            return self.labels
        return torch.where(self.answers(), self.ids, IGNORE_INDEX)


def _compare(
    check: Check,
    name: str,
    dataset: ConversationDataset,
    batch: Mapping[str, Any],
    pairs: Sequence[tuple[Mapping[str, Tensor], _PublicRow]],
) -> None:
    limit = check.case.info["model_max_length"]
    samples = [
        {key: value[:limit] if key != "pixel_values" else value for key, value in sample.items()} for sample, _ in pairs
    ]
    ours = Collator.from_tokenizer(dataset.processor.tokenizer)(samples)
    width = max(len(row.ids) for _, row in pairs)
    ids, labels, mask, public_mask = (
        torch.full((len(pairs), width), value) for value in (0, IGNORE_INDEX, False, False)
    )
    for place, (_, row) in enumerate(pairs):
        length = len(row.ids)
        ids[place, :length], labels[place, :length] = row.ids, row.expected_labels()
        mask[place, :length], public_mask[place, :length] = True, row.mask.bool()
    check.equal(f"{name}.input_ids", ours["input_ids"], ids)
    check.equal(f"{name}.labels", ours["labels"], labels)
    check.equal(f"{name}.attention_mask", ours["attention_mask"], mask)
    check.equal(f"{name}.attention_mask.public", ours["attention_mask"].bool() & (ours["input_ids"] != 0), public_mask)

    with_image = [row.has_image for _, row in pairs]
    if None in with_image:  # the public batch lost its images to the unreadable one in front
        with_image = [bool((row.ids == dataset.processor.image_token_id).any()) for _, row in pairs]
        shape = [3, _IMAGE_SIZE, _IMAGE_SIZE]
    else:
        shape = batch["image_shape"][1:]
    pixels = ours.get("pixel_values", torch.zeros(0, *shape))
    check.equal(f"{name}.image_shape", torch.tensor(pixels.shape), torch.tensor([sum(with_image), *shape]))
    _true(check, f"{name}.image_is_zero", bool(pixels.flatten(1).abs().amax(1).gt(0).all()))


def _verify_limit(check: Check, dataset: ConversationDataset, limited: ConversationDataset) -> None:
    """With the length limit: what fits stays as it is, what does not is refused (here all have a single round)."""
    for index in range(len(dataset)):
        free, sample = _sample_or_problem(dataset, index), _sample_or_problem(limited, index)
        if isinstance(free, dict) and len(free["input_ids"]) > check.case.info["model_max_length"]:
            _true(check, f"output.limit.{index}.refused", sample is Problem.CONVERSATION)
        elif isinstance(free, dict):
            kept = isinstance(sample, dict) and all(torch.equal(sample[key], free[key]) for key in free)
            _true(check, f"output.limit.{index}.kept", kept)
        else:
            _true(check, f"output.limit.{index}.problem", sample is free)


def _sample_or_problem(dataset: ConversationDataset, index: int) -> dict[str, Tensor] | Problem:
    try:
        return dataset[index]
    except DataError as error:
        return error.problem


def _refused(make: Any) -> bool:
    try:
        make()
    except DataError:
        return True
    return False


def _true(check: Check, name: str, value: bool) -> None:
    check.equal(name, torch.tensor([value]), torch.tensor([True]))
