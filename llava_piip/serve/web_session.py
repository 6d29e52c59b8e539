"""What the web page does, without the page: questions, streamed answers, stop, retry."""

from __future__ import annotations

import html
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from piip_core.errors import UserError, check

from ..inference import DEFAULT_NEW_TOKENS, ChatModel
from .dialogue import ChatImage, Conversation, open_image, parts_of
from .looking import look, network_view
from .remote import RemoteModel

__all__ = ["MAX_CHARACTERS", "MAX_IMAGES", "View", "WebChat", "WebSession", "shown_messages"]

_log = logging.getLogger(__name__)

MAX_IMAGES = 8  # of one conversation
MAX_CHARACTERS = 20_000  # of a question


@dataclass
class WebSession:
    """What is kept for one visitor; `stop` ends the answer that is on its way, and is None between answers."""

    conversation: Conversation
    stop: threading.Event | None = None


class View(NamedTuple):
    """What the page shows next: messages, a line below them, and whether an answer is on its way or was refused."""

    messages: list[dict[str, Any]]
    notice: str = ""
    running: bool = False
    refused: bool = False


class WebChat:
    """One model for many visitors; the page asks for one answer at a time.

    Args:
        model: Answers.
        system: A message in front of all conversations that replaces the template's own.
        max_new_tokens: Longest answer that visitors can set; half of the model's context at most.
    """

    def __init__(
        self, model: ChatModel | RemoteModel, system: str | None = None, max_new_tokens: int = 2 * DEFAULT_NEW_TOKENS
    ) -> None:
        self.model, self._system = model, system
        self.is_local = not isinstance(model, RemoteModel)
        self.max_new_tokens = min(max_new_tokens, model.context_length // 2) if self.is_local else max_new_tokens

    def session(self) -> WebSession:
        """A new visitor."""
        return WebSession(Conversation(self._system))

    def ask(self, session: WebSession, text: str, files: Sequence[str], settings: Mapping[str, Any]) -> Iterator[View]:
        """Adds a question with uploaded images and streams its answer, with settings of `ChatModel.stream`.

        A mistake becomes a notice, and leaves the conversation as it was.
        """

        def add(conversation: Conversation) -> None:
            if len(text) > MAX_CHARACTERS:
                raise UserError(f"the question has {len(text)} characters: at most {MAX_CHARACTERS} are taken")
            if (count := len(conversation.images) + len(files)) > MAX_IMAGES:
                raise UserError(f"the conversation would have {count} images: at most {MAX_IMAGES}; clear it")
            conversation.pending = [self._open(Path(file)) for file in files]
            conversation.ask(text)

        yield from self._turn(session, add, settings)

    def retry(self, session: WebSession, settings: Mapping[str, Any]) -> Iterator[View]:
        """Answers the last question once more, in place of its answer; see `ask`."""
        yield from self._turn(session, lambda conversation: conversation.ask(conversation.retract()), settings)

    def stop(self, session: WebSession) -> None:
        """Ends the answer that is on its way; what came of it stays."""
        if session.stop is not None:
            session.stop.set()

    def clear(self, session: WebSession) -> View:
        """Forgets the conversation, and ends an answer that is on its way."""
        self.stop(session)
        session.conversation = Conversation(self._system)
        return View([])

    def look(self, session: WebSession, number: int, **options: Any) -> tuple[Image.Image, Image.Image | None]:
        """What the branches look at in an image, counted from 1, of the conversation; see `looking.look`.

        Raises:
            UserError: If there is no such image, or as `look`.
        """
        images = session.conversation.images
        if not 1 <= number <= len(images):
            raise UserError(f"image {number}: the conversation has {len(images)}; ask about an image first")
        return look(self.model, images[number - 1], **options)

    def _open(self, path: Path) -> ChatImage:
        """An uploaded image, as the model sees it where it runs here: decoded files can be a hundred times larger."""
        image = open_image(str(path)).image
        return ChatImage(network_view(self.model, image) if self.is_local else image, str(path))

    def _turn(
        self, session: WebSession, change: Callable[[Conversation], Any], settings: Mapping[str, Any]
    ) -> Iterator[View]:
        """Changes the conversation so that it ends with a question, and streams the answer."""
        conversation = session.conversation
        if session.stop is not None:
            yield View(shown_messages(conversation), "an answer is on its way: stop it, or wait", True, True)
            return
        session.stop = stop = threading.Event()
        before, text, notice = list(conversation.turns), "", ""
        try:
            most, asked = self.max_new_tokens, settings.get("max_new_tokens", 1)
            check(asked <= most, "max_new_tokens", asked, f"at most {most}")
            change(conversation)
            yield View(shown_messages(conversation), running=True)
            messages, images = conversation.messages, conversation.images
            with self.model.stream(messages, images, **settings, stop_event=stop) as stream:
                for piece in stream:
                    text += piece
                    if session.conversation is conversation:
                        yield View(shown_messages(conversation, text), running=True)
            notice = _describe_end(stream.finish_reason, text)
        except Exception as error:
            text, notice = "", _describe_error(error)
        finally:  # also when nobody reads on
            session.stop, conversation.pending = None, []
            if text.strip():
                conversation.answer(text)
            else:
                conversation.turns[:] = before
        kept = session.conversation is conversation
        yield View(shown_messages(session.conversation), notice if kept else "", False, kept and not text.strip())


def shown_messages(conversation: Conversation, answer: str | None = None) -> list[dict[str, Any]]:
    """A conversation as Gradio's chatbot takes it: images by their files, everything else as escaped text.

    The chatbot inserts texts as HTML even where it renders no Markdown, and images can make a model say anything.
    `answer` is what came so far of the answer to a question at the end.
    """
    numbers, shown = itertools.count(1), []
    answers = [] if answer is None else [{"role": "assistant", "content": answer}]
    for turn in [*conversation.turns, *answers]:
        images, text = parts_of(turn)
        files = [{"path": image.source, "alt_text": f"image {next(numbers)}"} for image in images]
        escaped = {"type": "text", "text": html.escape(text, quote=False)}
        shown.append({"role": turn["role"], "content": [*files, escaped]})
    return shown


def _describe_end(finish_reason: str | None, text: str) -> str:
    """What to say about the end of an answer."""
    if not text.strip():
        return "stopped before the answer began" if finish_reason == "cancelled" else "the model said nothing"
    return {"length": "the answer was cut: raise the longest answer", "cancelled": "stopped"}.get(finish_reason, "")


def _describe_error(error: Exception) -> str:
    """What to say about a failure; nothing about the inside of the program."""
    if isinstance(error, UserError):
        return f"error: {error}"
    _log.error("an answer failed", exc_info=error)
    return "error: internal error"
