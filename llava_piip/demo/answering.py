"""Answers of a trained model to the questions of the demo, and a chat with it in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..conversation import IMAGE_TAG
from ..inference import ChatModel
from ..modeling import PIIPLlavaForConditionalGeneration
from ..processing import PIIPLlavaProcessor
from ..serve.dialogue import open_image
from ..serve.terminal import Terminal
from .questions import Question

__all__ = ["answer_all", "chat"]

_MOST_TOKENS = 48


def answer_all(
    model: PIIPLlavaForConditionalGeneration,
    processor: PIIPLlavaProcessor,
    questions: Sequence[Question],
    image_root: Path,
    *,
    batch_size: int = 64,
) -> list[str]:
    """Answers questions one by one, each in a conversation of its own, in batches and without sampling."""
    answers: list[str] = []
    answering = ChatModel(model, processor)
    progress = tqdm(total=len(questions), desc="answering", unit="question")
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        conversations = [[_user_message(question.text, question.image is not None)] for question in batch]
        images = [[] if question.image is None else [_open(image_root / question.image)] for question in batch]
        answers += _generate(answering, conversations, images)
        progress.update(len(batch))
    progress.close()
    return answers


def chat(
    model: PIIPLlavaForConditionalGeneration,
    processor: PIIPLlavaProcessor,
    pictures: Sequence[Path],
) -> None:
    """Talks about one picture after the other, until `/exit`, the end of the input or the last picture."""
    opened = (open_image(str(path)) for path in pictures)
    Terminal(ChatModel(model, processor), settings={"max_new_tokens": _MOST_TOKENS}, more_images=opened).run()


def _generate(
    model: ChatModel,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    images: Sequence[Sequence[Image.Image]],
) -> list[str]:
    prompts = [model.processor.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
    inputs = model.processor(text=prompts, images=images)
    return model.generate(inputs, model.generation_config(max_new_tokens=_MOST_TOKENS))


def _user_message(text: str, with_image: bool) -> dict[str, str]:
    return {"role": "user", "content": f"{IMAGE_TAG}\n{text}" if with_image else text}


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
