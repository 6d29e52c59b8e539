"""The data of the chat demo: images, LLaVA's two kinds of training files, questions for validation, and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from tqdm import tqdm

from piip_digits.data_sets import write_data_folder

from ..conversation import IMAGE_TAG
from .questions import (
    CHAT_SCENES,
    DESCRIBE,
    Question,
    SeenDigit,
    ask_all,
    ask_round_by_round,
    ask_sums,
    caption,
    imagine,
    in_words,
    render_chat_scene,
    seen_digits,
)

NUM_TEXTS = 12800  # conversations that the language model learns from, each seen once
_FORMAT = 1  # raise it when the same settings would give other files: data sets already there are then made anew
_TEXT_ONLY = 0.15  # part of the conversations that have no image
_TEXT_SUMS, _TEXT_CAPTIONS = 0.2, 0.3  # parts of the texts: sums alone, and, of the others, with a caption
_TEXT_ROUNDS = 8
_PROCESSES = 2
_CHUNK = 20  # scenes that a process is given at a time
_JPEG_QUALITY = 92  # read in a quarter of the time that PNG takes

Messages = list[dict[str, str]]


class ChatDataset:
    """The files of the data set in a folder.

    Attributes:
        image_root: Folder that the names of images are relative to.
        captions: First stage, in LLaVA's format: a caption for every training image.
        conversations: Second stage, in LLaVA's format: questions and answers, some of them without an image.
        questions: Validation, a `Question` per line, each for a conversation of its own.
    """

    def __init__(self, root: Path) -> None:
        self.image_root = root
        self.captions, self.conversations = root / "captions.json", root / "conversations.json"
        self.questions = root / "questions.jsonl"

    def images(self, split: str = "val") -> list[Path]:
        """The images of a split, in order."""
        return sorted((self.image_root / split).iterdir())

    def validation_questions(self) -> list[Question]:
        """What to ask in validation."""
        return [Question(**json.loads(line)) for line in self.questions.read_text().splitlines()]

    def training_questions(self) -> list[Question]:
        """All questions of the second stage, in order."""
        found = []
        for entry in json.loads(self.conversations.read_text()):
            values = [turn["value"].removeprefix(f"{IMAGE_TAG}\n") for turn in entry["conversations"]]
            for kind, text, answer in zip(entry["types"], values[::2], values[1::2], strict=True):
                found.append(Question(kind, text, answer, entry.get("image")))
        return found


def prepare_chat_dataset(root: Path | str, num_train: int = 4000, num_val: int = 300) -> ChatDataset:
    """Makes the data set, unless it is there already; training and validation share no digit and no photograph.

    Raises:
        UserError: If the folder holds something that this function did not write.
    """
    scenes = [num_train, num_val]
    settings = {"format": _FORMAT, "scenes": scenes, "texts": NUM_TEXTS, "config": asdict(CHAT_SCENES)}
    write_data_folder(Path(root), settings, partial(_write_files, num_train=num_train, num_val=num_val))
    return ChatDataset(Path(root))


def imagine_conversations(count: int, seed: int = 0) -> list[Messages]:
    """Conversations in the words of the data set, below an image in words (`in_words`).

    Questions come in any order, for this is where the language model learns to look things up. Some conversations
    start with a caption, and some are sums without an image.
    """
    rng = Random(f"texts {seed}")
    conversations = []
    for _ in range(count):
        if rng.random() < _TEXT_SUMS:
            turns = _list_turns(ask_sums(rng, _TEXT_ROUNDS))
        else:
            digits = imagine(rng)
            asked = [question for _ in range(3) for question in ask_all(digits, rng)]
            rng.shuffle(asked)
            turns = _list_turns(asked[:_TEXT_ROUNDS])
            if rng.random() < _TEXT_CAPTIONS:
                turns[:2] = DESCRIBE, caption(digits)
            turns[0] = f"{in_words(digits, rng)}\n{turns[0]}"
        roles_and_turns = zip(cycle(("user", "assistant")), turns)
        conversations.append([{"role": role, "content": turn} for role, turn in roles_and_turns])
    return conversations


def _write_files(root: Path, num_train: int, num_val: int) -> None:
    files = ChatDataset(root)
    train, val = _draw_scenes(root, "train", num_train), _draw_scenes(root, "val", num_val)
    captions = [_as_llava([DESCRIBE, caption(digits)], name) for name, digits in train.items()]
    files.captions.write_text(json.dumps(captions))

    rng = Random("conversations")
    asked = [(ask_round_by_round(digits, rng), name) for name, digits in train.items()]
    text_only = round(num_train * _TEXT_ONLY / (1 - _TEXT_ONLY))
    asked += [(ask_sums(rng, rng.choice((3, 4))), None) for _ in range(text_only)]
    rng.shuffle(asked)
    entries = [
        _as_llava(_list_turns(questions), name) | {"types": [question.type for question in questions]}
        for questions, name in asked
    ]
    files.conversations.write_text(json.dumps(entries))

    rng = Random("questions")
    to_ask = [replace(question, image=name) for name in val for question in ask_all(val[name], rng)]
    files.questions.write_text("".join(json.dumps(asdict(question)) + "\n" for question in to_ask))


def _draw_scenes(root: Path, split: str, count: int) -> dict[str, list[SeenDigit]]:
    """Draws the scenes of a split in several processes; what is in each, by the name of its image."""
    (root / split).mkdir()
    names = [f"{split}/{index:06d}.jpg" for index in range(count)]
    # Forked: processes that start from nothing would import transformers for as long as the drawing takes
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("fork")) as pool:
        drawn = pool.map(partial(_draw_scene, root, split), range(count), names, chunksize=_CHUNK)
        progress = tqdm(drawn, total=count, desc=f"drawing {split} scenes", unit="scene")
        return dict(zip(names, progress, strict=True))


def _draw_scene(root: Path, split: str, index: int, name: str) -> list[SeenDigit]:
    scene = render_chat_scene(split, index)
    Image.fromarray(scene.image).save(root / name, quality=_JPEG_QUALITY)
    return seen_digits(scene)


def _list_turns(questions: Sequence[Question]) -> list[str]:
    return [turn for question in questions for turn in (question.text, question.answer)]


def _as_llava(turns: list[str], image: str | None) -> dict[str, Any]:
    """An entry of a file in LLaVA's format."""
    if image is not None:
        turns[0] = f"{IMAGE_TAG}\n{turns[0]}"
    conversation = [{"from": role, "value": turn} for role, turn in zip(cycle(("human", "gpt")), turns)]
    return ({} if image is None else {"id": image, "image": image}) | {"conversations": conversation}
