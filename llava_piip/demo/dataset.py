"""The data set of the chat demo: pictures, LLaVA's two kinds of training files, texts, and questions for validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from tqdm import tqdm

from piip_core.errors import ConfigError, UserError
from piip_core.files import publish_folder
from piip_digits.scenes import SceneConfig

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

__all__ = ["ChatDataset", "imagine_conversations", "prepare_chat_dataset"]

_FORMAT = 1  # raise it when the same settings would give other files: data sets already there are then made anew
_MANIFEST = "manifest.json"
_TEXT_ONLY = 0.15  # part of the conversations that have no picture
_TEXT_SUMS, _TEXT_CAPTIONS = 0.2, 0.3  # parts of the texts: sums alone, and, of the others, with a caption
_TEXT_ROUNDS = 8
_PROCESSES = 2
_CHUNK = 20  # scenes that a process is given at a time
_JPEG_QUALITY = 92  # read in a quarter of the time that PNG takes

_ROLES, _LLAVA_ROLES = ("user", "assistant"), ("human", "gpt")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatDataset:
    """The files of the data set.

    Attributes:
        image_root: Folder that the names of pictures are relative to.
        captions: First stage, in LLaVA's format: a caption for every training picture.
        conversations: Second stage, in LLaVA's format: questions and answers, some of them without a picture.
        questions: Validation, a `Question` per line, each for a conversation of its own.
        text: For the language model: what `imagine_conversations` gives.
    """

    image_root: Path
    captions: Path
    conversations: Path
    questions: Path
    text: Path

    @classmethod
    def below(cls, root: Path) -> ChatDataset:
        """The files as they are named in a folder."""
        return cls(
            image_root=root,
            captions=root / "captions.json",
            conversations=root / "conversations.json",
            questions=root / "questions.jsonl",
            text=root / "text.json",
        )

    def pictures(self, split: str = "val") -> list[Path]:
        """The pictures of a split, in order."""
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

    def texts(self) -> list[Messages]:
        """What the language model learns from."""
        return json.loads(self.text.read_text())


def prepare_chat_dataset(
    root: Path | str,
    num_train: int = 4000,
    num_val: int = 300,
    num_texts: int = 12800,
    config: SceneConfig = CHAT_SCENES,
) -> ChatDataset:
    """Makes the data set, unless it is there already.

    It is made under another name and renamed when complete; one made with other settings is replaced. Training and
    validation share no digit sample and no photograph.

    Args:
        root: Folder of the data set, commonly ``datasets/digit_chat``.
        num_train: Number of training pictures.
        num_val: Number of validation pictures.
        num_texts: Number of conversations about pictures that do not exist.
        config: Look of the scenes; it needs a palette.

    Raises:
        ConfigError: If a number is not positive or the scenes have no palette.
        UserError: If the folder holds something that this function did not write.
    """
    root = Path(root)
    for name, number in (("num_train", num_train), ("num_val", num_val), ("num_texts", num_texts)):
        if number < 1:
            raise ConfigError(f"{name}={number}: expected at least 1")
    if config.palette is None:
        raise ConfigError("palette=None: colours without a name cannot be asked for; use NAMED_COLOURS")
    settings = {"format": _FORMAT, "scenes": [num_train, num_val], "texts": num_texts, "config": asdict(config)}
    manifest = json.dumps(settings, indent=1) + "\n"
    found = root / _MANIFEST
    if root.is_dir() and any(root.iterdir()) and not found.is_file():
        raise UserError(f"{root}: holds files, but no chat data set; move them away or name another folder")
    if not found.is_file() or found.read_text() != manifest:
        with publish_folder(root, overwrite=True, durable=False) as aside:
            _write(ChatDataset.below(aside), num_train, num_val, num_texts, config)
            (aside / _MANIFEST).write_text(manifest)
    return ChatDataset.below(root)


def imagine_conversations(count: int, seed: int = 0) -> list[Messages]:
    """Conversations in the words of the data set, below a picture in words (`in_words`).

    Questions come in any order, for this is where the language model learns to look things up. Some conversations
    start with a caption, and some are sums without a picture.

    Args:
        count: Number of conversations.
        seed: Of everything random.
    """
    rng = Random(f"texts {seed}")
    conversations = []
    for _ in range(count):
        if rng.random() < _TEXT_SUMS:
            turns = _turns(ask_sums(rng, _TEXT_ROUNDS))
        else:
            digits = imagine(rng)
            asked = [question for _ in range(3) for question in ask_all(digits, rng)]
            rng.shuffle(asked)
            turns = _turns(asked[:_TEXT_ROUNDS])
            if rng.random() < _TEXT_CAPTIONS:
                turns[:2] = DESCRIBE, caption(digits)
            turns[0] = f"{in_words(digits, rng)}\n{turns[0]}"
        conversations.append([{"role": role, "content": turn} for role, turn in zip(cycle(_ROLES), turns)])
    return conversations


def _write(files: ChatDataset, num_train: int, num_val: int, num_texts: int, config: SceneConfig) -> None:
    """Writes everything but the manifest."""
    train = _draw(files.image_root, "train", num_train, config)
    val = _draw(files.image_root, "val", num_val, config)
    _write_json(files.captions, [_entry([f"{IMAGE_TAG}\n{DESCRIBE}", caption(train[name])], name) for name in train])

    rng = Random("conversations")
    asked = [(ask_round_by_round(digits, rng), name) for name, digits in train.items()]
    asked += [(_sums(rng), None) for _ in range(round(num_train * _TEXT_ONLY / (1 - _TEXT_ONLY)))]
    rng.shuffle(asked)
    entries = []
    for questions, name in asked:
        turns = _turns(questions, picture=None if name is None else IMAGE_TAG)
        entries.append(_entry(turns, name) | {"types": [question.type for question in questions]})
    _write_json(files.conversations, entries)

    rng = Random("questions")
    to_ask = [replace(question, image=name) for name in val for question in ask_all(val[name], rng)]
    files.questions.write_text("".join(json.dumps(asdict(question)) + "\n" for question in to_ask))
    _write_json(files.text, imagine_conversations(num_texts))


def _draw(root: Path, split: str, count: int, config: SceneConfig) -> dict[str, list[SeenDigit]]:
    """Draws the scenes of a split in several processes; what is in each, by the name of its picture."""
    (root / split).mkdir()
    names = [f"{split}/{index:06d}.jpg" for index in range(count)]
    # Forked: processes that start from nothing would import transformers for as long as the drawing takes
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("fork")) as pool:
        drawn = pool.map(partial(_draw_one, root, split, config), range(count), names, chunksize=_CHUNK)
        progress = tqdm(drawn, total=count, desc=f"drawing {split} scenes", unit="scene")
        return dict(zip(names, progress, strict=True))


def _draw_one(root: Path, split: str, config: SceneConfig, index: int, name: str) -> list[SeenDigit]:
    scene = render_chat_scene(split, index, config)
    Image.fromarray(scene.image).save(root / name, quality=_JPEG_QUALITY)
    return seen_digits(scene)


def _sums(rng: Random) -> list[Question]:
    """The questions of a conversation without a picture."""
    return ask_sums(rng, rng.choice((3, 4)))


def _turns(questions: Sequence[Question], picture: str | None = None) -> list[str]:
    """Questions and answers in turns, below what stands for the picture."""
    turns = [turn for question in questions for turn in (question.text, question.answer)]
    return turns if picture is None else [f"{picture}\n{turns[0]}", *turns[1:]]


def _entry(turns: Sequence[str], image: str | None) -> dict[str, Any]:
    """An entry of a file in LLaVA's format."""
    conversation = [{"from": role, "value": turn} for role, turn in zip(cycle(_LLAVA_ROLES), turns)]
    return ({} if image is None else {"id": image, "image": image}) | {"conversations": conversation}


def _write_json(path: Path, content: list[Any]) -> None:
    path.write_text(json.dumps(content))
