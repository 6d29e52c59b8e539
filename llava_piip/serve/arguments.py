"""Options that the programs of this package share: which model, and how to load it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from piip_core.errors import UserError

from .generation import DTYPES, QUANTIZATIONS, ChatModel

__all__ = ["add_model_arguments", "add_prompt_cache_arguments", "exit_status", "load_model"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_model` reads."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder that training or the converter wrote, or of a run"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: the first GPU, or the CPU)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="precision (default: the file's)")
    parser.add_argument(
        "--load-in", choices=list(QUANTIZATIONS), help="quantise the language model (needs bitsandbytes)"
    )


def add_prompt_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `PromptCache`, for programs that answer one question at a time."""
    parser.add_argument(
        "--kept-tokens",
        type=int,
        metavar="N",
        help="tokens of conversations whose keys and values are kept between answers, 0 for none (default: as many as "
        "the model's context has)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the generation behind the first token, with CUDA graphs on a GPU; the first answer takes long",
    )


def load_model(args: argparse.Namespace, **options: Any) -> ChatModel:
    """Loads the model that the options of `add_model_arguments` name.

    Args:
        args: With these options.
        **options: Others of `ChatModel.load`.

    Raises:
        UserError: As `ChatModel.load`.
    """
    return ChatModel.load(args.model, device=args.device, dtype=args.dtype, quantization=args.load_in, **options)


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns; 2 with a line on standard error for a mistake of the user, 130 for Ctrl-C, 141 if nobody
    reads the output any more."""
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
