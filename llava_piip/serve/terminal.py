"""A conversation in the terminal, or with questions out of a pipe."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from piip_core.errors import UserError

from ..inference import ChatModel
from .arguments import check_text
from .dialogue import ChatImage, Conversation, open_image
from .remote import RemoteModel

__all__ = ["Terminal"]

_SHOWN_CONTROLS = ("\n", "\t")
_BROKEN = "\udcff"  # how Python reads a byte that is no text, where its settings do not make that an error


class Terminal:
    """Reads questions and commands, and shows answers as they come.

    In a terminal, mistakes are shown and the conversation goes on. Otherwise standard output has the answers and
    nothing else, and the first mistake ends it.

    Args:
        chat: Answers.
        conversation: Goes on with this one.
        settings: For `ChatModel.stream`: max_new_tokens, temperature, top_p.
        more_images: Images that the command `/next` goes through, each with a new conversation.
    """

    def __init__(
        self,
        chat: ChatModel | RemoteModel,
        conversation: Conversation | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        more_images: Iterable[ChatImage] | None = None,
    ) -> None:
        self.chat = chat
        self.conversation = conversation or Conversation()
        self._settings = dict(settings or {})
        self._more = None if more_images is None else iter(more_images)
        self._interactive = sys.stdin is not None and sys.stdin.isatty()
        self._saved: set[str] = set()
        self._commands: dict[str, tuple[str, str, Callable[[str], bool]]] = {
            "/image": ("FILE|URL", "adds an image to the next question", self._add_image),
            "/reset": ("", "forgets the conversation and its images", self._reset),
            "/save": ("FILE", "writes the conversation, as .json or .md", self._save),
            "/help": ("", "shows this", self._help),
            "/exit": ("", "ends, as the end of the input does", lambda _: False),
        }
        if self._more is not None:
            self._commands["/next"] = ("", "goes on with another image", self._next)

    def run(self) -> int:
        """Talks until `/exit`, the end of the input, or the last of `more_images`.

        Returns:
            Exit status: 2 after a mistake in questions that do not come from a terminal, 130 after Ctrl-C in them.
        """
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (importing it gives `input` editing and a history)
            self._help("")
        try:
            goes_on = self._more is None or self._next("")
            while goes_on:
                goes_on = self._step()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        return 0

    def _step(self) -> bool:
        """One line of the input; whether there may be another."""
        try:
            line = input("you: " if self._interactive else "")
        except (EOFError, RuntimeError):  # RuntimeError: a closed standard input
            return False
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._print("\n(/exit or Ctrl-D ends the program)")
            return True
        except UnicodeDecodeError:
            line = _BROKEN
        try:
            check_text(line, "the line")
            return self._command(line.strip()) if line.startswith("/") else self._question(line.strip())
        except UserError as error:
            if not self._interactive:
                raise
            self._print(f"error: {error}")
        except KeyboardInterrupt:  # before the first piece, or once more while an answer ends
            if not self._interactive:
                raise
            self._print("(stopped)")
        return True

    def _command(self, line: str) -> bool:
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            hint = f"known: {', '.join(self._commands)}; put a space before a question that starts with /"
            raise UserError(f"{name}: no such command; {hint}")
        expected, _, run = self._commands[name]
        argument = argument.strip().strip("\"'")
        if bool(expected) != bool(argument):
            raise UserError(f"expected: {name} {expected}".strip())
        return run(argument)

    def _question(self, text: str) -> bool:
        if not text:
            return True
        self.conversation.ask(text)
        answer = ""
        try:
            answer = self._stream_answer()
        finally:
            if answer:
                self.conversation.answer(answer)
            else:
                self.conversation.retract()
        if not answer:
            self._print("(no answer; the question is taken back)")
        return True

    def _stream_answer(self) -> str:
        """The answer, as far as it came when Ctrl-C stopped it."""
        pieces: list[str] = []
        conversation = self.conversation
        with self.chat.stream(conversation.messages, conversation.images, **self._settings) as stream:
            if self._interactive:
                print("model: ", end="", flush=True)
            try:
                for piece in stream:
                    pieces.append(piece)
                    print(_printable(piece), end="", flush=True)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                stream.close()
            finally:
                print(flush=True)
        if stream.finish_reason == "length":
            self._print(f"(the answer was cut after {stream.answer_tokens} tokens, see --max-new-tokens)")
        elif stream.finish_reason == "cancelled":
            self._print("(stopped)")
        return "".join(pieces).strip()

    def _add_image(self, source: str) -> bool:
        self.conversation.pending.append(open_image(source))
        count = len(self.conversation.pending)
        self._print(f"({count} image{'s' if count > 1 else ''} with the next question)")
        return True

    def _reset(self, _: str) -> bool:
        self.conversation.reset()
        self._print("(a new conversation)")
        return True

    def _save(self, path: str) -> bool:
        self.conversation.save(path, overwrite=path in self._saved)
        self._saved.add(path)
        self._print(f"(written to {path})")
        return True

    def _next(self, _: str) -> bool:
        image = next(self._more, None)
        if image is None:
            self._print("These were all the images.")
            return False
        self.conversation.reset()
        self.conversation.pending.append(image)
        self._print(f"The image is {image.source} (open it beside this window).")
        return True

    def _help(self, _: str) -> bool:
        self._print("Type a question, or a command; Ctrl-C stops an answer.")
        for name, (argument, meaning, _run) in self._commands.items():
            self._print(f"  {f'{name} {argument}':<16} {meaning}")
        return True

    def _print(self, text: str) -> None:
        print(text, file=sys.stdout if self._interactive else sys.stderr, flush=True)


def _printable(text: str) -> str:
    """Without control characters: an answer must not steer the terminal."""
    return "".join(char for char in text if char in _SHOWN_CONTROLS or unicodedata.category(char) != "Cc")
