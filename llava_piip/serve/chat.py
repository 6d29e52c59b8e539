"""Talks in the terminal with a trained or converted model, or with one behind an OpenAI-compatible server.

Answers appear as they are generated. Ctrl-C stops an answer, /exit or Ctrl-D ends the program, /help shows the
commands. Questions may come from a pipe: then standard output has the answers and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from piip_core.errors import UserError

from ..inference import DEFAULT_NEW_TOKENS, check_sampling
from .arguments import exit_status, load_model, make_parser
from .dialogue import Conversation, open_image
from .terminal import Terminal

__all__ = ["main"]

_EXAMPLES = """\
  python -m llava_piip.serve.chat --model output/chat_demo/stage2 --image photo.jpg
  echo "What is in the picture?" | python -m llava_piip.serve.chat --model output/piip_llava --image photo.jpg
  python -m llava_piip.serve.chat --model output/piip_llava --load-in 4bit --temperature 0.2
  python -m llava_piip.serve.chat --server http://127.0.0.1:8000/v1 --image photo.jpg
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`."""
    parser = make_parser("chat", __doc__, _EXAMPLES)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE|URL",
        help="image that goes with the first question; give it again for several",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the most probable (default 1: all)")
    parser.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"most tokens of an answer (default {DEFAULT_NEW_TOKENS}, or as many as the context has room for; "
        "with --server as the server has it)",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    settings = {"temperature": args.temperature, "top_p": args.top_p}
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    check_sampling(**settings)
    if args.seed is not None and not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed}: expected a number of 64 bits")
    conversation = Conversation(args.system)
    conversation.pending = [open_image(source) for source in args.image]
    chat = load_model(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return Terminal(chat, conversation, settings=settings).run()


if __name__ == "__main__":
    sys.exit(main())
