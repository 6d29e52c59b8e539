"""Cases of training data: samples and batches out of records, and the order of the samples."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from checkers import Check, GoldenCase
from llava_piip.conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from llava_piip.data import Collator, ConversationDataset, DataError, Problem, read_records
from llava_piip.data.records import is_placeholder
from llava_piip.data.sampler import group_by_length, group_by_modality
from llava_piip.image_processing import PIIPImageProcessor

from .text import PUBLIC_IMAGE_ID, llama_tokenizer, refused_labels


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
            check.same(f"output.{number}.exception", "exception" in entry, True)
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
    check, samples, batches = Check(case), case.info["samples"], case.info["batches"]
    tokenizer_file = case.path.parent / case.info["tokenizer_file"]
    with (
        tempfile.TemporaryDirectory() as folder,
        llama_tokenizer(tokenizer_file, legacy=case.info["legacy"]) as tokenizer,
    ):
        path = _write_samples(Path(folder), samples, _missing_images(samples, batches))
        size = next((batch["image_shape"][-1] for batch in batches if "image_shape" in batch), None)
        processor = _Processor(tokenizer, len(tokenizer), PIIPImageProcessor(size=size, pad_to_square=True))
        dataset = ConversationDataset(read_records(path), processor, folder)
        for name in ("lengths", "modality_lengths"):
            check.equal(f"output.{name}", torch.tensor(getattr(dataset, name)), torch.tensor(case.info[name]))
        for number, batch in enumerate(batches):
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
    token_size: int | None = None

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


def _missing_images(samples: Sequence[Mapping[str, Any]], batches: Sequence[Mapping[str, Any]]) -> set[str]:
    """Files that the public run did not find: the fewest of those that best explain what it printed at the batches."""
    names = sorted({sample["image"] for sample in samples if "image" in sample})

    def explains(missing: Sequence[str], batch: Mapping[str, Any]) -> bool:
        lost = [samples[index].get("image") in missing for index in batch["indices"]]
        # Without the first sample a batch has no images, and without any there is no batch
        without_images = "input_ids" in batch and not batch["has_images"]
        return sum(lost) == _errors(batch) and (all(lost) if "input_ids" not in batch else lost[0] == without_images)

    sets = (some for count in range(len(names) + 1) for some in combinations(names, count))
    return set(max(sets, key=lambda missing: sum(explains(missing, batch) for batch in batches)))


def _errors(batch: Mapping[str, Any]) -> int:
    """Samples that the public run left out of a batch."""
    return sum(line.startswith("ERROR") for line in batch["printed"])


def _write_samples(folder: Path, samples: Sequence[Mapping[str, Any]], missing: set[str]) -> Path:
    """The records and their images, which are black: normalised, that is not zero."""
    for name in {sample["image"] for sample in samples if "image" in sample} - missing:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 10)).save(folder / name, format="PNG")
    path = folder / "samples.json"
    path.write_text(json.dumps(samples))
    return path


def _verify_batch(check: Check, name: str, dataset: ConversationDataset, batch: Mapping[str, Any]) -> None:
    """One batch: the samples that can be used, against the public rows of them."""
    samples = [_sample_or_error(dataset, index) for index in batch["indices"]]
    readable = [(i, x) for i, x in zip(batch["indices"], samples, strict=True) if _problem(x) is not Problem.MISSING]
    check.same(f"{name}.missing", len(samples) - len(readable), _errors(batch))
    if "input_ids" not in batch:
        check.refuses(f"{name}.exception", lambda: Collator(0)([dataset[index] for index, _ in readable]))
        return

    rows = [_PublicRow.of(batch, row, dataset) for row in range(len(batch["input_ids"]))]
    check.same(f"{name}.rows", len(rows), len(readable))
    pairs = []
    for (index, _), row in zip(readable, rows, strict=False):
        reason = _refused(check.case.info["samples"][index], row)
        sample = check.attempt(f"{name}.refused.{index}", partial(dataset.__getitem__, index), reason)
        if sample is not None:
            pairs.append((sample, row))
    if pairs:
        _compare(check, name, dataset, batch, pairs)


def _refused(sample: Mapping[str, Any], row: _PublicRow) -> str:
    """Why ours refuses on purpose a sample of which the public code made this row; empty if it does not."""
    if "image" in sample and row.places != 1:
        return "one placeholder for each image"
    if "image" not in sample and any(is_placeholder(turn["value"]) for turn in sample["conversations"]):
        return "a placeholder of its own without an image"
    return refused_labels(row.expected_labels().tolist())


@dataclass(frozen=True)
class _PublicRow:
    """A row of a public batch without its padding."""

    ids: Tensor
    labels: Tensor
    mask: Tensor
    has_image: bool | None
    places: int
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, batch: Mapping[str, Any], row: int, dataset: ConversationDataset) -> _PublicRow:
        processor = dataset.processor
        ids = torch.tensor(batch["input_ids"][row])
        places = int((ids == PUBLIC_IMAGE_ID).sum())
        length = int((ids != processor.tokenizer.pad_token_id).nonzero().max()) + 1  # which no text ends in
        ids = torch.where(ids == PUBLIC_IMAGE_ID, processor.image_token_id, ids)[:length]
        labels, mask = (torch.tensor(batch[key][row])[:length] for key in ("labels", "attention_mask"))
        has_image = not batch["image_is_zero"][row] if batch["has_images"] else None
        return cls(ids, labels, mask, has_image, places, processor.tokenizer)

    def answers(self) -> Tensor:
        """Where answers are: from the id after each "ASSISTANT:" to the next end token."""
        found, text, inside = [], "", False
        for piece in self.tokenizer.convert_ids_to_tokens(self.ids.tolist()):
            found.append(inside)
            text += piece or ""  # the id of images has none
            inside = (inside or text.endswith("ASSISTANT:")) and piece != self.tokenizer.eos_token
        return torch.tensor(found)

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
    limit, tokenizer = check.case.info["model_max_length"], dataset.processor.tokenizer
    samples = [
        {key: value[:limit] if key != "pixel_values" else value for key, value in sample.items()} for sample, _ in pairs
    ]
    ours = Collator(tokenizer.pad_token_id)(samples)
    width = max(len(row.ids) for _, row in pairs)
    ids, labels, mask, public_mask = (
        torch.full((len(pairs), width), value) for value in (tokenizer.pad_token_id, IGNORE_INDEX, False, False)
    )
    for place, (_, row) in enumerate(pairs):
        length = len(row.ids)
        ids[place, :length], labels[place, :length] = row.ids, row.expected_labels()
        mask[place, :length], public_mask[place, :length] = True, row.mask.bool()
    check.equal(f"{name}.input_ids", ours["input_ids"], ids)
    check.equal(f"{name}.labels", ours["labels"], labels)
    check.equal(f"{name}.attention_mask", ours["attention_mask"], mask)
    seen = ours["attention_mask"].bool() & (ours["input_ids"] != tokenizer.pad_token_id)
    check.equal(f"{name}.attention_mask.public", seen, public_mask)

    with_image = [row.has_image for _, row in pairs]
    size = dataset.processor.image_processor.image_size
    shape = batch.get("image_shape", [0, 3, size, size])[1:]
    if None in with_image:  # the public batch lost its images to the unreadable one in front
        with_image = [row.places > 0 for _, row in pairs]
    pixels = ours.get("pixel_values", torch.zeros(0, *shape))
    check.same(f"{name}.image_shape", list(pixels.shape), [sum(with_image), *shape])
    check.same(f"{name}.image_is_zero", bool(pixels.flatten(1).abs().amax(1).gt(0).all()), True)


def _verify_limit(check: Check, dataset: ConversationDataset, limited: ConversationDataset) -> None:
    """With the length limit: what fits stays as it is, what does not loses whole rounds, or is refused."""
    limit, end = limited.max_length, dataset.processor.tokenizer.eos_token_id
    for index in range(len(dataset)):
        free, name = _sample_or_error(dataset, index), f"output.limit.{index}"
        if isinstance(free, DataError):
            check.same(f"{name}.problem", _problem(_sample_or_error(limited, index)), free.problem)
            continue
        ids, labels = free["input_ids"], free["labels"]
        ends = [*((ids == end).nonzero().flatten() + 1).tolist(), len(ids)]
        fitting = max((length for length in ends if length <= limit), default=0)
        reason = refused_labels(labels[:fitting].tolist()) and "what fits has nothing to train on"
        sample = check.attempt(f"{name}.refused", partial(limited.__getitem__, index), reason)
        if sample is not None:
            kept = len(sample["input_ids"])
            check.same(f"{name}.length", fitting <= kept <= limit, True)
            check.equal(f"{name}.kept", sample["input_ids"], ids[:kept])
            check.equal(f"{name}.labels", sample["labels"], labels[:kept])


def _sample_or_error(dataset: ConversationDataset, index: int) -> dict[str, Tensor] | DataError:
    try:
        return dataset[index]
    except DataError as error:
        return error


def _problem(sample: dict[str, Tensor] | DataError) -> Problem | None:
    return sample.problem if isinstance(sample, DataError) else None
