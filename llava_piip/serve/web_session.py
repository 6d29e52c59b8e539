"""What the web page does, without the page: questions, streamed answers, stop, retry, and limits."""

from __future__ import annotations

import html
import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from piip_core.errors import UserError

from ..conversation import IMAGE_TAG
from .dialogue import Conversation, Picture
from .fetching import FetchError, FetchPolicy, decode_image
from .generation import DEFAULT_NEW_TOKENS, ChatModel, SamplingError
from .looking import Look, look
from .pictures import network_view

__all__ = ["View", "WebChat", "WebLimits", "WebSession", "shown_messages"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WebLimits:
    """How much visitors may ask for.

    Attributes:
        pictures: Bytes and pixels of a picture, and how many a conversation may have.
        max_characters: Longest question.
        max_new_tokens: Longest answer that can be set.
        max_waiting: Questions that wait for their turn; more are refused.
        sessions: Conversations kept; the one that was not used for the longest time makes room.
        session_seconds: How long a conversation is kept after its last answer.
        upload_seconds: How long uploaded files are kept.
    """

    pictures: FetchPolicy = field(default_factory=FetchPolicy)
    max_characters: int = 20_000
    max_new_tokens: int = 2 * DEFAULT_NEW_TOKENS
    max_waiting: int = 16
    sessions: int = 200
    session_seconds: int = 2 * 3600
    upload_seconds: int = 6 * 3600


@dataclass
class WebSession:
    """What is kept for one visitor.

    Attributes:
        conversation: Ends with an answer, unless one is on its way.
        stop: Ends the answer that is on its way; None between answers.
    """

    conversation: Conversation = field(default_factory=Conversation)
    stop: threading.Event | None = None


class View(NamedTuple):
    """What the page shows next.

    Attributes:
        messages: See `shown_messages`.
        notice: A line below them; "" for nothing.
        running: Whether an answer is on its way.
        refused: Whether the question was not taken, so that it stays where it was typed.
    """

    messages: list[dict[str, Any]]
    notice: str = ""
    running: bool = False
    refused: bool = False


class _End(NamedTuple):
    error: BaseException | None = None
    finish_reason: str | None = None


class WebChat:
    """One model for many visitors, one of which is answered at a time.

    Args:
        chat: Answers.
        limits: How much visitors may ask for.
        system: A message in front of all conversations that replaces the template's own.
    """

    def __init__(self, chat: ChatModel, limits: WebLimits | None = None, *, system: str | None = None) -> None:
        self.chat = chat
        self.limits = limits or WebLimits()
        self._system = system
        self._turn = threading.Lock()  # looking into the blocks must not see an answer's pictures

    @property
    def most_new_tokens(self) -> int:
        """Longest answer that can be set: half of the context is for the conversation."""
        return min(self.limits.max_new_tokens, self.chat.context_length // 2)

    @property
    def default_new_tokens(self) -> int:
        """Longest answer to begin with, which leaves room for several questions."""
        return min(DEFAULT_NEW_TOKENS, self.most_new_tokens, self.chat.context_length // 4)

    def session(self) -> WebSession:
        """A new visitor."""
        return WebSession(Conversation(self._system))

    def ask(
        self, session: WebSession, text: str, files: Sequence[str | Path], settings: Mapping[str, Any]
    ) -> Iterator[View]:
        """Adds a question and streams its answer. A mistake becomes a notice, and leaves the conversation as it was.

        Args:
            session: Of the visitor.
            text: The question.
            files: Uploaded pictures that go with it.
            settings: For `ChatModel.stream`: max_new_tokens, temperature, top_p.
        """
        yield from self._turned(session, lambda conversation: self._add(conversation, text, files), settings)

    def retry(self, session: WebSession, settings: Mapping[str, Any]) -> Iterator[View]:
        """Answers the last question once more, in place of its answer; see `ask`."""

        def again(conversation: Conversation) -> None:
            conversation.ask(conversation.retract())

        yield from self._turned(session, again, settings)

    def stop(self, session: WebSession) -> None:
        """Ends the answer that is on its way; what came of it stays."""
        if session.stop is not None:
            session.stop.set()

    def clear(self, session: WebSession) -> View:
        """Forgets the conversation, and ends an answer that is on its way."""
        self.stop(session)
        session.conversation = Conversation(self._system)
        return View([])

    def look(self, session: WebSession, number: int, *, at: tuple[int, int] | None, depth: float) -> Look:
        """What the branches look at in a picture of the conversation; see `llava_piip.serve.looking.look`.

        Args:
            session: Of the visitor.
            number: Which picture, from 1.
            at: As `look`.
            depth: As `look`.

        Raises:
            UserError: If there is no such picture, or as `look`.
        """
        pictures = session.conversation.pictures
        if not 1 <= number <= len(pictures):
            raise UserError(f"picture {number}: the conversation has {len(pictures)}; ask about a picture first")
        with self._turn:
            return look(self.chat, pictures[number - 1].image, at=at, depth=depth)

    def _add(self, conversation: Conversation, text: str, files: Sequence[str | Path]) -> None:
        policy = self.limits.pictures
        if len(text) > self.limits.max_characters:
            raise UserError(f"the question has {len(text)} characters: at most {self.limits.max_characters} are taken")
        count = len(conversation.pictures) + len(files)
        if count > policy.max_images:
            raise UserError(
                f"the conversation would have {count} pictures: at most {policy.max_images} are taken; clear it, or "
                "give fewer"
            )
        conversation.pending = [self._picture(Path(file), policy) for file in files]
        conversation.ask(text)

    def _picture(self, path: Path, policy: FetchPolicy) -> Picture:
        """Only as the model sees it, which is the same to the model: decoded files can be a hundred times larger."""
        try:
            with path.open("rb") as file:
                data = file.read(policy.max_bytes + 1)
        except OSError:
            raise FetchError(path.name, "the uploaded file is gone: upload it again") from None
        return Picture(network_view(self.chat, decode_image(data, field=path.name, policy=policy)), str(path))

    def _turned(self, session: WebSession, change: Any, settings: Mapping[str, Any]) -> Iterator[View]:
        """Changes the conversation so that it ends with a question, and streams the answer."""
        conversation = session.conversation
        if session.stop is not None:
            yield View(shown_messages(conversation), "an answer is on its way: stop it, or wait", True, True)
            return
        session.stop = stop = threading.Event()
        before = list(conversation.turns), list(conversation.pictures)
        pieces, text, end = queue.SimpleQueue(), "", None
        try:
            self._check(settings)
            change(conversation)
            yield View(shown_messages(conversation), running=True)
            work = (conversation.messages, conversation.images, dict(settings), stop, pieces)
            threading.Thread(target=self._generate, args=work, daemon=True).start()
            while end is None:
                more, end = _waiting(pieces)
                text += more
                if session.conversation is conversation and text:
                    yield View(shown_messages(conversation, text), running=True)
            if end.error is not None:
                raise end.error
        except Exception as error:
            text, end = "", _End(error=error)
        finally:  # also when nobody reads on
            stop.set()
            session.stop = None
            conversation.pending = []
            if text.strip():
                conversation.answer(text)
            else:
                conversation.turns[:], conversation.pictures[:] = before
        kept = session.conversation is conversation
        yield View(
            shown_messages(session.conversation), _notice(end, text) if kept else "", False, kept and not text.strip()
        )

    def _check(self, settings: Mapping[str, Any]) -> None:
        most = self.most_new_tokens
        if settings.get("max_new_tokens", 1) > most:
            raise SamplingError("max_new_tokens", f"is {settings['max_new_tokens']}, expected at most {most}")

    def _generate(
        self,
        messages: list[dict[str, str]],
        images: list[Any],
        settings: dict[str, Any],
        stop: threading.Event,
        pieces: queue.SimpleQueue[str | _End],
    ) -> None:
        """In a thread of its own, so that an answer that nobody reads any more cannot keep the model's turn."""
        try:
            with self._turn, self.chat.stream(messages, images, **settings, stop_event=stop) as stream:
                for piece in stream:
                    pieces.put(piece)
            pieces.put(_End(finish_reason=stream.finish_reason))
        except BaseException as error:  # raised again where the answer is read
            pieces.put(_End(error=error))


def shown_messages(conversation: Conversation, answer: str | None = None) -> list[dict[str, Any]]:
    """A conversation as Gradio's chatbot takes it: pictures by their files, everything else as escaped text.

    The chatbot inserts texts as HTML even where it renders no Markdown, and pictures can make a model say anything.

    Args:
        conversation: The conversation.
        answer: As far as it came, behind a question at the end.
    """
    sources, number, shown = iter(conversation.pictures), 0, []
    for turn in conversation.turns:
        text, content = turn["content"], []
        for _ in range(text.count(IMAGE_TAG) if turn["role"] == "user" else 0):
            number += 1
            content.append({"path": next(sources).source, "alt_text": f"picture {number}"})
        text = text.removeprefix(f"{IMAGE_TAG}\n" * len(content))
        shown.append({"role": turn["role"], "content": [*content, _text(text)]})
    if answer is not None:
        shown.append({"role": "assistant", "content": [_text(answer)]})
    return shown


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": html.escape(text, quote=False)}


def _waiting(pieces: queue.SimpleQueue[str | _End]) -> tuple[str, _End | None]:
    """All pieces that are there, at least one, joined: the page may be slower than the model."""
    found = [pieces.get()]
    while not pieces.empty():
        found.append(pieces.get())
    end = found.pop() if isinstance(found[-1], _End) else None
    return "".join(found), end


def _notice(end: _End, text: str) -> str:
    """What to say about the end of an answer; nothing about the inside of the program."""
    if isinstance(end.error, torch.OutOfMemoryError):
        return "error: too little memory for this conversation: clear it, or give fewer pictures"
    if isinstance(end.error, UserError):
        return f"error: {end.error}"
    if end.error is not None:
        _log.error("an answer failed", exc_info=end.error)
        return "error: internal error"
    if not text.strip():
        return "stopped before the answer began" if end.finish_reason == "cancelled" else "the model said nothing"
    return {"length": "the answer was cut: raise the longest answer", "cancelled": "stopped"}.get(
        end.finish_reason or "", ""
    )
