"""Answering questions of a benchmark in batches, with the published settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BatchFeature

from piip_core.errors import UserError

from ..conversation import IMAGE_TAG, render_conversation
from ..data.images import ImageFolder, read_image
from ..inference import ChatModel
from ..processing import PIIPLlavaProcessor
from .benchmark import Benchmark, Question

__all__ = ["Preparation", "answers_in_batches", "default_dtype", "prompt_of"]


def default_dtype(device: torch.device) -> str:
    """The precision of the published results on a GPU; single precision elsewhere, where half is slow."""
    return "float16" if device.type == "cuda" else "float32"


def prompt_of(question: Question, *, chat_template: str, tokenizer: Any = None) -> str:
    """The prompt that a question is asked with: a conversation of its own, the image first."""
    text = question.text if question.image is None else f"{IMAGE_TAG}\n{question.text}"
    messages = [{"role": "user", "content": text}]
    options = {"chat_template": chat_template, "tokenizer": tokenizer}
    return render_conversation(messages, **options, add_generation_prompt=True)[0]


@dataclass(frozen=True)
class Preparation:
    """Makes batches of a benchmark's questions what the model takes; runs in worker processes.

    `images` is None where the questions hold them.
    """

    benchmark: Benchmark
    processor: PIIPLlavaProcessor
    images: ImageFolder | None

    def __call__(self, questions: Sequence[Question]) -> tuple[Sequence[Question], BatchFeature | UserError]:
        """The questions with `input_ids`, `attention_mask` and, with images, `pixel_values`.

        Or with what is wrong, such as a missing image: raised in a worker, it would come as a traceback.
        """
        template, tokenizer = self.processor.chat_template, self.processor.tokenizer
        try:
            prompts = [prompt_of(question, chat_template=template, tokenizer=tokenizer) for question in questions]
            # A tag that a question has itself is one more placeholder, with the same image, as in the published results
            images = [
                [] if question.image is None else [self.image_of(question)] * prompt.count(IMAGE_TAG)
                for question, prompt in zip(questions, prompts, strict=True)
            ]
            convert = self.benchmark.convert_before_padding
            return questions, self.processor(text=prompts, images=images, convert_before_padding=convert)
        except UserError as error:
            return questions, error

    def image_of(self, question: Question) -> Image.Image:
        """The image of a question that has one.

        Raises:
            DataError: If it is missing or broken.
        """
        convert = self.benchmark.convert_before_padding
        if isinstance(question.image, bytes):
            return read_image(question.image, f"the image of question {question.id}", convert=convert)
        if self.images is None:
            raise UserError(f"question {question.id!r} names the image {question.image!r}: give the folder of images")
        return self.images.open(question.image, convert=convert)


def answers_in_batches(
    model: ChatModel,
    benchmark: Benchmark,
    image_folder: Path | None,
    batches: Sequence[Sequence[Question]],
    *,
    workers: int = 0,
) -> Iterator[list[str]]:
    """Answers batches of questions one after the other, greedily; images are read by worker processes meanwhile.

    Raises:
        ConfigError: If there is no such folder of images.
        DataError: If an image is missing or broken.
        UserError: If a prompt leaves no room for an answer, or a batch does not fit into memory.
    """
    # Images of the archives are links to one copy in many installations
    images = None if image_folder is None else ImageFolder(image_folder, follow_links=True)
    prepare = Preparation(benchmark, model.processor, images)
    for questions, inputs in DataLoader(batches, batch_size=None, collate_fn=prepare, num_workers=workers):
        if isinstance(inputs, UserError):
            raise inputs
        length = inputs["input_ids"].shape[1]
        room = model.context_length - length
        if room < 1:
            raise UserError(
                f"question {questions[0].id!r} or one beside it has {length} tokens, visual ones included, and the "
                f"model's context is {model.context_length}: prompts are not cut"
            )
        yield model.generate(inputs, model.generation_config(max_new_tokens=min(benchmark.max_new_tokens, room)))
