"""Options that the programs of this package share: which model, and how to load or reach it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from piip_core.errors import UserError

from ..inference import DTYPES, QUANTIZATIONS, ChatModel
from .remote import RemoteModel

__all__ = ["check_text", "exit_status", "load_model", "make_parser"]


def make_parser(program: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that `load_model` reads."""
    parser = argparse.ArgumentParser(
        prog=f"python -m llava_piip.serve.{program}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="folder that training or the converter wrote, or of a run; with --server the model's name there",
    )
    parser.add_argument(
        "--server", metavar="URL", help="ask an OpenAI-compatible server instead, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: the first GPU, or the CPU)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], help="precision (default auto: the file's)")
    parser.add_argument(
        "--load-in", choices=list(QUANTIZATIONS), help="quantise the language model (needs bitsandbytes)"
    )
    parser.add_argument("--system", metavar="TEXT", help="message in front, instead of the template's own")
    return parser


def load_model(args: argparse.Namespace) -> ChatModel | RemoteModel:
    """Loads or reaches the model that the options of `make_parser` name.

    Raises:
        UserError: If neither a model nor a server is given, an option that belongs to the other, or a text that is no
            UTF-8; or as `ChatModel.load` and `RemoteModel`.
    """
    check_text(args.system or "", "--system")
    if args.server is not None:
        for option in ("device", "dtype", "load_in", "seed"):
            if getattr(args, option, None) is not None:
                name = option.replace("_", "-")
                raise UserError(f"--{name} with --server {args.server}: the server decides that; leave --{name} out")
        return RemoteModel(args.server, name=args.model)
    if args.model is None:
        raise UserError("--model DIR: expected a model's folder, or --server URL")
    print(f"loading {args.model} ...", file=sys.stderr, flush=True)
    return ChatModel.load(args.model, device=args.device, dtype=args.dtype or "auto", quantization=args.load_in)


def check_text(text: str, where: str) -> None:
    """Raises a `UserError` for a text with bytes that are no UTF-8, which Python reads as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not UTF-8 text: convert it") from None


def exit_status(run: Callable[[], int]) -> int:
    """Runs a program and returns its exit status.

    Returns:
        What `run` returns; 2 with a line on standard error for a mistake of the user, 130 for Ctrl-C, 141 if nobody
        reads the output any more.
    """
    try:
        return run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail at the exit
        return 141
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
