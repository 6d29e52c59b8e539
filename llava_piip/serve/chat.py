"""Talks in the terminal with a trained or converted model, or with one behind an OpenAI-compatible server.

Answers appear as they are generated. Ctrl-C stops an answer, /exit or Ctrl-D ends the program, /help shows the
commands. Questions may come from a pipe: then standard output has the answers and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piip_core.errors import UserError
from piip_core.files import write_atomically

from ..inference import DEFAULT_NEW_TOKENS, DTYPES, QUANTIZATIONS, ChatModel, check_sampling
from .dialogue import Conversation, open_image
from .remote import RemoteModel

_HELP = """\
Type a question, or a command; Ctrl-C stops an answer.
  /image FILE|URL  adds an image to the next question
  /reset           forgets the conversation and its images
  /save FILE       writes the conversation, as JSON
  /help            shows this
  /exit            ends, as the end of the input does"""
_SHOWN_CONTROLS = ("\n", "\t")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`."""
    parser = make_parser("chat", __doc__)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE|URL",
        help="image that goes with the first question; give it again for several",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the most probable (default 1: all)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"most tokens of an answer (default {DEFAULT_NEW_TOKENS}, or as many as the context has room for; "
        "with --server what the server has)",
    )
    args = parser.parse_args(arguments)
    settings = {"temperature": args.temperature, "top_p": args.top_p}
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    try:
        check_sampling(**{"max_new_tokens": DEFAULT_NEW_TOKENS, **settings})  # before the first question
        pending = [(source, open_image(source)) for source in args.image]
        return Terminal(load_model(args), Conversation(args.system, pending=pending), settings).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that `load_model` reads."""
    parser = argparse.ArgumentParser(prog=f"python -m llava_piip.serve.{program}", description=description)
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="folder that training or the converter wrote, or of a run, or the name of a released model; with --server "
        "the model's name there",
    )
    parser.add_argument(
        "--server", metavar="URL", help="ask an OpenAI-compatible server instead, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: the first GPU, or the CPU)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], help="precision (default auto: the file's)")
    parser.add_argument("--load-in", choices=QUANTIZATIONS, help="quantise the language model (needs bitsandbytes)")
    parser.add_argument("--system", metavar="TEXT", help="message in front, instead of the template's own")
    return parser


def load_model(args: argparse.Namespace) -> ChatModel | RemoteModel:
    """Loads or reaches the model that the options of `make_parser` name."""
    if args.server is not None:
        loading = {"--device": args.device, "--dtype": args.dtype, "--load-in": args.load_in}
        if given := ", ".join(name for name, value in loading.items() if value is not None):
            raise UserError(f"{given} with --server {args.server}: the server decides that; leave {given} out")
        return RemoteModel(args.server, args.model)
    if args.model is None:
        raise UserError("expected --model DIR, the folder of a model, or --server URL")
    print(f"loading {args.model} ...", file=sys.stderr, flush=True)
    return ChatModel.load(args.model, device=args.device, dtype=args.dtype or "auto", quantization=args.load_in)


class Terminal:
    """Reads questions and commands, and shows answers as they come.

    In a terminal, mistakes are shown and the conversation goes on. Otherwise standard output has the answers and
    nothing else, and the first mistake ends it.

    Args:
        chat: Answers.
        conversation: Goes on with this one.
        settings: For `ChatModel.stream`: max_new_tokens, temperature, top_p.
    """

    def __init__(self, chat: ChatModel | RemoteModel, conversation: Conversation, settings: Mapping[str, Any]) -> None:
        self._chat, self._conversation, self._settings = chat, conversation, settings
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        """Talks until `/exit` or the end of the input.

        Returns:
            Exit status: 2 after a mistake in questions that do not come from a terminal, 130 after Ctrl-C in them.
        """
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (importing it gives `input` editing and a history)
            self._print(_HELP)
        goes_on = True
        while goes_on:
            try:
                goes_on = self._step()
            except UserError as error:
                self._print(f"error: {error}")
                if not self._interactive:
                    return 2
            except KeyboardInterrupt:
                if not self._interactive:
                    return 130
                self._print("\n(stopped; /exit or Ctrl-D ends the program)")
        return 0

    def _step(self) -> bool:
        """One line of the input; whether there may be another."""
        try:
            line = input("you: " if self._interactive else "")
        except (EOFError, RuntimeError):  # RuntimeError: a closed standard input
            return False
        except UnicodeDecodeError:
            raise UserError("the line is not UTF-8 text: convert it") from None
        if line.startswith("/"):
            return self._command(line.strip())
        if line.strip():
            self._question(line)
        return True

    def _command(self, line: str) -> bool:
        name, _, argument = line.partition(" ")
        argument = argument.strip().strip("\"'")
        match name, bool(argument):
            case "/image", True:
                self._conversation.pending.append((argument, open_image(argument)))
                self._print(f"(images with the next question: {len(self._conversation.pending)})")
            case "/reset", False:
                self._conversation.reset()
                self._print("(a new conversation)")
            case "/save", True:
                self._save(Path(argument).expanduser())
            case "/help", False:
                self._print(_HELP)
            case "/exit", False:
                return False
            case _:
                commands = "/image FILE|URL, /reset, /save FILE, /help or /exit"
                raise UserError(f"{line}: expected {commands}; put a space before a question that starts with /")
        return True

    def _question(self, text: str) -> None:
        self._conversation.ask(text)
        prefix = "model: " if self._interactive else ""
        said = ""
        with contextlib.closing(self._conversation.answer(self._chat, **self._settings)) as pieces:
            try:
                for piece in pieces:
                    print(_printable(piece if said else prefix + piece), end="", flush=True)
                    said += piece
            finally:
                if said:
                    print(flush=True)
        if not said.strip():
            self._print("(no answer; the question is taken back)")
        elif self._conversation.stream.finish_reason == "length":
            self._print("(the answer was cut, see --max-new-tokens)")

    def _save(self, path: Path) -> None:
        if path.exists():
            raise UserError(f"{path}: exists; expected the name of a new file")
        with write_atomically(path, "w") as file:
            json.dump({"messages": self._conversation.messages}, file, indent=2, ensure_ascii=False)
        self._print(f"(written to {path})")

    def _print(self, text: str) -> None:
        print(text, file=sys.stdout if self._interactive else sys.stderr, flush=True)


def _printable(text: str) -> str:
    """Without control characters: an answer must not steer the terminal."""
    return "".join(char for char in text if char in _SHOWN_CONTROLS or unicodedata.category(char) != "Cc")


if __name__ == "__main__":
    sys.exit(main())
