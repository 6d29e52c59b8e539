"""A conversation with images as it grows: what the terminal and the web page keep between two answers."""

from __future__ import annotations

import http.client
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from piip_core.errors import UserError

from ..conversation import ConversationError
from ..data.images import read_image
from ..image_processing import ImageError
from ..inference import ChatModel
from ..streaming import AnswerStream
from .remote import RemoteModel, RemoteStream


@dataclass
class Conversation:
    """Questions and answers with their images.

    Attributes:
        system: A message in front that replaces the template's own.
        messages: As `ChatModel.stream` takes them; the part of an image says where it came from ("url").
        images: Those of all messages, in order.
        pending: Images that go with the next question, and where they came from.
        stream: The latest answer; closing it ends the answer.
    """

    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    pending: list[tuple[str, Image.Image]] = field(default_factory=list)
    stream: AnswerStream | RemoteStream | None = None

    def ask(self, text: str) -> None:
        """Adds a question after the pending images. `<image>` in it is text like any other."""
        if not text.strip():
            raise ConversationError("the question is empty: type a text")
        if self.system is not None and not self.messages:
            self.messages = [{"role": "system", "content": self.system}]
        parts = [{"type": "image", "url": source} for source, _ in self.pending]
        self.messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text.strip()}]})
        self.images += [image for _, image in self.pending]
        self.pending = []

    def answer(self, chat: ChatModel | RemoteModel, **settings: Any) -> Iterator[str]:
        """Streams the answer to the question at the end, with settings of `ChatModel.stream`.

        What came of an answer that was stopped stays. Without any, or after an error, the question is taken back.
        """
        text = ""
        try:
            with chat.stream(self.messages, self.images, **settings) as self.stream:
                for piece in self.stream:
                    text += piece
                    yield piece
        except Exception:
            text = ""
            raise
        finally:  # also when nobody reads on
            self.messages.append({"role": "assistant", "content": text.strip()})
            if not text.strip():
                self.retract()

    def retract(self) -> str:
        """Takes the last question and its answer back; returns its text, and its images are pending again."""
        if len(self.messages) < 2:
            raise UserError("there is no question to take back")
        question, _ = self.messages[-2:]
        del self.messages[-2:]
        *parts, text = question["content"]
        start = len(self.images) - len(parts)
        self.pending = [*zip((part["url"] for part in parts), self.images[start:], strict=True), *self.pending]
        del self.images[start:]
        return text["text"]

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages, self.images, self.pending = [], [], []


def open_image(source: str) -> Image.Image:
    """Opens the image of a path or address as a viewer shows it.

    For somebody who may read every file here and connect to every address.
    """
    if source.lower().startswith(("http://", "https://", "data:")):
        return read_image(_fetch(source), source[:100], as_viewed=True)
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise ImageError(f"{source}: no such file; expected an image, or an address that starts with https://")
    return read_image(path, f"image {source!r}", as_viewed=True)


def _fetch(address: str) -> bytes:
    """What an address holds; `urllib` reads data: as well."""
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "piip-llava"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{address[:100]}: no image could be read from there ({error})") from error
