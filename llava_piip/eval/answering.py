"""Answering questions of a benchmark in batches, with the published settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader
from transformers import BatchFeature

from piip_core.errors import UserError

from ..conversation import IMAGE_TAG, render_conversation
from ..data.images import ImageFolder, read_image
from ..inference import ChatModel
from ..processing import PIIPLlavaProcessor
from .benchmark import Benchmark, Question

__all__ = ["Preparation", "answers_in_batches", "prompt_of"]


def prompt_of(question: Question, *, chat_template: str, tokenizer: Any = None) -> str:
    """The prompt that a question is asked with: a conversation of its own, the image first."""
    text = question.text if question.image is None else f"{IMAGE_TAG}\n{question.text}"
    messages = [{"role": "user", "content": text}]
    return render_conversation(messages, chat_template=chat_template, tokenizer=tokenizer, add_generation_prompt=True)[
        0
    ]


@dataclass(frozen=True)
class Preparation:
    """Makes batches of questions what the model takes; runs in worker processes.

    Attributes:
        benchmark: Whose questions they are.
        processor: The model's.
        images: The benchmark's images; None where questions hold them.
    """

    benchmark: Benchmark
    processor: PIIPLlavaProcessor
    images: ImageFolder | None

    @classmethod
    def of(cls, benchmark: Benchmark, processor: PIIPLlavaProcessor, image_folder: Path | None) -> Preparation:
        """Raises a `ConfigError` if there is no such folder of images."""
        # Images of the archives are links to one copy in many installations
        images = None if image_folder is None else ImageFolder(image_folder, follow_links=True)
        return cls(benchmark, processor, images)

    def __call__(self, questions: Sequence[Question]) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with images, `pixel_values` of questions.

        Raises:
            DataError: If an image is missing or broken.
        """
        template, tokenizer = self.processor.chat_template, self.processor.tokenizer
        prompts = [prompt_of(question, chat_template=template, tokenizer=tokenizer) for question in questions]
        images = []
        for question, prompt in zip(questions, prompts, strict=True):
            image = self.image_of(question)
            # A tag that a question has itself is one more place, which gets the same image, as in the published results
            images.append([] if image is None else [image] * prompt.count(IMAGE_TAG))
        convert = self.benchmark.convert_before_padding
        return self.processor(text=prompts, images=images, convert_before_padding=convert)

    def attempt(self, questions: Sequence[Question]) -> tuple[Sequence[Question], BatchFeature | UserError]:
        """The questions with their inputs, or with what is wrong: raised in a worker, it would come as a traceback."""
        try:
            return questions, self(questions)
        except UserError as error:
            return questions, error

    def image_of(self, question: Question) -> Image.Image | None:
        """The image of a question.

        Raises:
            DataError: If it is missing or broken.
        """
        convert = self.benchmark.convert_before_padding
        if question.image is None:
            return None
        if isinstance(question.image, bytes):
            return read_image(question.image, f"the image of question {question.id}", convert=convert)
        if self.images is None:
            raise UserError(f"question {question.id!r} names the image {question.image!r}: give the folder of images")
        return self.images.open(question.image, convert=convert)


def answers_in_batches(
    model: ChatModel, preparation: Preparation, batches: Sequence[Sequence[Question]], *, workers: int = 0
) -> Iterator[list[str]]:
    """Answers batches one after the other, greedily; images are read in worker processes meanwhile.

    Args:
        model: The model.
        preparation: Makes its inputs.
        batches: Questions to answer together.
        workers: Number of processes that read images; 0 for none.

    Yields:
        The answers of a batch.

    Raises:
        DataError: If an image is missing or broken.
        UserError: If a prompt leaves no room for an answer, or a batch does not fit into memory.
    """
    loader = DataLoader(batches, batch_size=None, collate_fn=preparation.attempt, num_workers=workers)
    for questions, inputs in loader:
        if isinstance(inputs, UserError):
            raise inputs
        length = inputs["input_ids"].shape[1]
        room = model.context_length - length
        if room < 1:
            raise UserError(
                f"question {questions[0].id!r} or one beside it has {length} tokens, visual ones included, and the "
                f"model's context is {model.context_length}: prompts are not cut"
            )
        settings = model.generation_config(max_new_tokens=min(preparation.benchmark.max_new_tokens, room))
        yield model.generate(inputs, settings)
