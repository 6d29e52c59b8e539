"""Answers of a trained model to the questions of the demo, and a chat with it in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..conversation import IMAGE_TAG
from ..inference import ChatModel
from ..serve.chat import Terminal
from ..serve.dialogue import Conversation, open_image
from .questions import Question

__all__ = ["answer_all", "chat_about"]

_MOST_TOKENS = 48


def answer_all(chat: ChatModel, questions: Sequence[Question], image_root: Path, *, batch_size: int = 64) -> list[str]:
    """Answers questions one by one, each in a conversation of its own, in batches and without sampling."""
    answers: list[str] = []
    with tqdm(total=len(questions), desc="answering", unit="question") as progress:
        for first in range(0, len(questions), batch_size):
            prompts, images = [], []
            for question in questions[first : first + batch_size]:
                text = question.text if question.image is None else f"{IMAGE_TAG}\n{question.text}"
                prompts.append(chat.prompt([{"role": "user", "content": text}]))
                images.append([] if question.image is None else [open_image(str(image_root / question.image))])
            inputs = chat.processor(text=prompts, images=images)
            answers += chat.generate(inputs, chat.generation_config(max_new_tokens=_MOST_TOKENS))
            progress.update(len(prompts))
    return answers


def chat_about(chat: ChatModel, images: Sequence[Path]) -> None:
    """Talks about the first image, and those that are added to the conversation."""
    first, *others = map(str, images)
    print(f"The image is {first} (open it beside this window). /reset and /image FILE take another: {others[0]} ...")
    Terminal(chat, Conversation(pending=[(first, open_image(first))]), {"max_new_tokens": _MOST_TOKENS}).run()
