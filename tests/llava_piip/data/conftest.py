"""Small conversation files, images, and a processor that makes one id of every word."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_piip.conversation import IGNORE_INDEX, IMAGE_TAG, ConversationError, EncodedConversation

IMAGE_TOKEN, IMAGE_TOKENS, SIZE = 99, 3, 4
PAD = 0


@dataclass
class WordProcessor:
    """Ids: the length of each word; images: their mean colours. Rounds beyond the maximum length are cut."""

    seen: list[list[dict[str, str]]] = field(default_factory=list)
    token_size: int | None = None

    def image_processor(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt" and all(image.mode == "RGB" for image in images)
        colors = [torch.tensor(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) for image in images]
        return {"pixel_values": torch.stack([color.float()[:, None, None].expand(3, SIZE, SIZE) for color in colors])}

    def encode_conversation(
        self,
        messages: list[dict[str, str]],
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
        has_images: bool = True,
    ) -> EncodedConversation:
        self.seen.append(messages)
        rounds = [messages[start : start + 2] for start in range(0, len(messages), 2)]
        for kept in range(len(rounds), 0, -1):
            encoded = self._encode([m for pair in rounds[:kept] for m in pair], has_images, len(rounds) - kept)
            if max_length is None or len(encoded.input_ids) <= max_length:
                if all(label == IGNORE_INDEX for label in encoded.labels):
                    raise ConversationError("no token to train on")
                return encoded
        raise ConversationError(f"the first round does not fit into {max_length}")

    def _encode(self, messages: list[dict[str, str]], has_images: bool, cut: int) -> EncodedConversation:
        ids, labels, images = [], [], 0
        for message in messages:
            for word in message["content"].split():
                is_image = has_images and word == IMAGE_TAG
                new = [IMAGE_TOKEN] * IMAGE_TOKENS if is_image else [len(word)]
                images += is_image
                ids += new
                labels += new if message["role"] == "assistant" and not is_image else [IGNORE_INDEX] * len(new)
        return EncodedConversation(ids, labels, images, cut)


@pytest.fixture
def processor() -> WordProcessor:
    return WordProcessor()


@pytest.fixture
def talk() -> Callable[..., list[dict[str, str]]]:
    """Makes the turns of texts that human and gpt say in turn."""
    return lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes entries to a .json or .jsonl file of the test's folder."""

    def write(entries: Any, name: str = "talks.json") -> Path:
        path = tmp_path / name
        lines = [json.dumps(entry) for entry in entries] if path.suffix == ".jsonl" else [json.dumps(entries)]
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one-coloured images: red.png, green.png in sub/, blue.jpg."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(root / "red.png")
    Image.new("RGB", (8, 6), (0, 255, 0)).save(root / "sub" / "green.png")
    Image.new("RGB", (8, 6), (0, 0, 255)).save(root / "blue.jpg")
    return root
