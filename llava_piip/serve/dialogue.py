"""A conversation with pictures as it grows: what the terminal and the web page keep between two answers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..conversation import IMAGE_TAG, ConversationError
from ..data.images import ImageFolder
from ..image_processing import ImageError
from .fetching import FetchPolicy, fetch_image

__all__ = ["Conversation", "Picture", "open_picture"]

_TITLES = {"system": "System", "user": "You", "assistant": "Model"}


class Picture(NamedTuple):
    """A picture and where it came from."""

    image: Image.Image
    source: str


@dataclass
class Conversation:
    """Questions, answers and pictures.

    Attributes:
        system: A message in front that replaces the template's own.
        turns: {"role": "user" or "assistant", "content": text with `<image>`}.
        pictures: Those of `turns`, in order.
        pending: Pictures that go with the next question.
    """

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    pending: list[Picture] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """For `ChatModel.stream`, with the system message."""
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + self.turns

    @property
    def images(self) -> list[Image.Image]:
        """For `ChatModel.stream`."""
        return [picture.image for picture in self.pictures]

    def ask(self, text: str) -> None:
        """Adds a question, with the pending pictures in front of it, or where it says `<image>`.

        Raises:
            ConversationError: If the text is empty, or says `<image>` more or less often than there are pictures.
        """
        if not text.strip():
            raise ConversationError("the question is empty: type a text")
        tags, pictures = text.count(IMAGE_TAG), len(self.pending)
        if tags not in (0, pictures):
            raise ConversationError(
                f"the question has {tags} {IMAGE_TAG} for {pictures} new pictures: write one where each belongs, or "
                "none at all"
            )
        content = text.strip() if tags else "\n".join([IMAGE_TAG] * pictures + [text.strip()])
        self.turns.append({"role": "user", "content": content})
        self.pictures += self.pending
        self.pending = []

    def answer(self, text: str) -> None:
        """Adds the answer to the question at the end."""
        self.turns.append({"role": "assistant", "content": text.strip()})

    def retract(self) -> str:
        """Takes the last question back, with its answer if there is one; its pictures are pending again.

        Returns:
            The question.

        Raises:
            UserError: If there is none.
        """
        if not self.turns:
            raise UserError("there is no question to take back")
        question = self.turns.pop()
        if question["role"] == "assistant":
            question = self.turns.pop()
        first = len(self.pictures) - question["content"].count(IMAGE_TAG)
        self.pending = self.pictures[first:] + self.pending
        del self.pictures[first:]
        return question["content"]

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.turns, self.pictures, self.pending = [], [], []

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the conversation with the places of its pictures.

        Args:
            path: "*.json" for messages and images as `ChatModel.stream` takes them, "*.md" to read.
            overwrite: Whether a file may be replaced.

        Raises:
            UserError: For another name, or if the file exists or cannot be written.
        """
        path = Path(path).expanduser()
        writers = {".json": self._as_json, ".md": self._as_markdown}
        if path.suffix not in writers:
            raise UserError(f"{path}: expected a name that ends in {' or '.join(writers)}")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists; expected the name of a new file")
        try:
            with write_atomically(path, "w") as file:
                file.write(writers[path.suffix]())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    def _as_json(self) -> str:
        saved: dict[str, Any] = {"messages": self.messages, "images": [picture.source for picture in self.pictures]}
        return json.dumps(saved, indent=2, ensure_ascii=False) + "\n"

    def _as_markdown(self) -> str:
        sources = iter(self.pictures)
        parts = []
        for message in self.messages:
            text = message["content"]
            if message["role"] == "user":
                first, *others = text.split(IMAGE_TAG)
                text = first + "".join(f"![picture](<{next(sources).source}>){other}" for other in others)
            parts.append(f"**{_TITLES[message['role']]}**\n\n{text}\n")
        return "\n".join(parts)


def open_picture(source: str) -> Picture:
    """Opens a picture for somebody who may read every file here.

    Args:
        source: Path of a file, or an address that starts with https://, http:// or data:. Addresses inside of private
            networks are refused.

    Raises:
        ImageError: If there is no such file.
        UserError: If it is no picture, too large, or cannot be fetched.
    """
    if source.startswith(("http://", "https://", "data:")):
        return Picture(fetch_image(source, field=source[:100], policy=FetchPolicy(allow_http=True)), source)
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if not path.is_file():
        raise ImageError(f"{source}: no such file; expected a picture, or an address that starts with https://")
    return Picture(ImageFolder(path.parent, follow_links=True).open(path.name), str(path))
