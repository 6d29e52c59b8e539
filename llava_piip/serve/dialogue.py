"""A conversation with images as it grows: what the terminal and the web page keep between two answers."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..conversation import ConversationError
from ..data.images import read_image
from ..image_processing import ImageError

__all__ = ["ChatImage", "Conversation", "open_image"]

_TITLES = {"system": "System", "user": "You", "assistant": "Model"}


class ChatImage(NamedTuple):
    """An image and where it came from."""

    image: Image.Image
    source: str


@dataclass
class Conversation:
    """Questions, answers and images.

    Attributes:
        system: A message in front that replaces the template's own.
        turns: {"role": "user" or "assistant", "content": text, or parts: images, each with its `ChatImage`, and text}.
        pending: Images that go with the next question.
    """

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    pending: list[ChatImage] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """For `ChatModel.stream`, with the system message."""
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + self.turns

    @property
    def images(self) -> list[Image.Image]:
        """The images of all turns in order, for `ChatModel.stream`."""
        return [image.image for turn in self.turns for image in parts_of(turn)[0]]

    def ask(self, text: str) -> None:
        """Adds a question after the pending images. `<image>` in it is text like any other.

        Raises:
            ConversationError: If the text is empty.
        """
        if not text.strip():
            raise ConversationError("the question is empty: type a text")
        images = [{"type": "image", "image": image} for image in self.pending]
        content = [*images, {"type": "text", "text": text.strip()}] if images else text.strip()
        self.turns.append({"role": "user", "content": content})
        self.pending = []

    def answer(self, text: str) -> None:
        """Adds the answer to the question at the end."""
        self.turns.append({"role": "assistant", "content": text.strip()})

    def retract(self) -> str:
        """Takes the last question back and returns it; its answer goes, and its images are pending again.

        Raises:
            UserError: If there is none.
        """
        if not self.turns:
            raise UserError("there is no question to take back")
        question = self.turns.pop()
        if question["role"] == "assistant":
            question = self.turns.pop()
        images, text = parts_of(question)
        self.pending = images + self.pending
        return text

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.turns, self.pending = [], []

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the conversation with the names of its images.

        Args:
            path: "*.json" for messages as `PIIPLlavaProcessor.apply_chat_template` takes them, "*.md" to read.
            overwrite: Whether a file may be replaced.

        Raises:
            UserError: For another name, or if the file exists or cannot be written.
        """
        path = Path(path).expanduser()
        if path.suffix not in (".json", ".md"):
            raise UserError(f"{path}: expected a name that ends in .json or .md")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; expected the name of a new file")
        try:
            with write_atomically(path, "w") as file:
                file.write(self._as_json() if path.suffix == ".json" else self._as_markdown())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    def _as_json(self) -> str:
        messages = []
        for message in self.messages:
            images, text = parts_of(message)
            parts = [{"type": "image", "url": image.source} for image in images]
            content = [*parts, {"type": "text", "text": text}] if parts else text
            messages.append({"role": message["role"], "content": content})
        return json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n"

    def _as_markdown(self) -> str:
        parts = []
        for message in self.messages:
            images, text = parts_of(message)
            lines = [f"![image](<{image.source}>)" for image in images] + [text]
            parts.append(f"**{_TITLES[message['role']]}**\n\n" + "\n".join(lines) + "\n")
        return "\n".join(parts)


def parts_of(turn: dict[str, Any]) -> tuple[list[ChatImage], str]:
    """Images and text of a turn."""
    content = turn["content"]
    if isinstance(content, str):
        return [], content
    return [part["image"] for part in content if part["type"] == "image"], content[-1]["text"]


def open_image(source: str) -> ChatImage:
    """Opens an image as a viewer shows it, for somebody who may read every file here and connect to every address.

    Args:
        source: Path of a file, or an address that starts with https://, http:// or data:.

    Raises:
        UserError: If there is no image, or it is too large.
    """
    if source.lower().startswith(("http://", "https://", "data:")):
        return ChatImage(read_image(_fetch(source), source[:100], as_viewed=True), source)
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if not path.is_file():
        raise ImageError(f"{source}: no such file; expected an image, or an address that starts with https://")
    return ChatImage(read_image(path, f"image {source!r}", as_viewed=True), str(path))


def _fetch(address: str) -> bytes:
    """What an address holds; `urllib` reads data: as well."""
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "piip-llava"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{address[:100]}: no image could be read from there ({error})") from error
