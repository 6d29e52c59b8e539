"""Talks in the browser with a trained or converted model, or with one behind an OpenAI-compatible server.

Images and questions, answers as they are generated, and what each branch of the vision tower looked at. The page is
served to this machine only unless --host says otherwise; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from piip_core.errors import ConfigError, UserError

from ..inference import DEFAULT_NEW_TOKENS
from .arguments import exit_status, load_model, make_parser

__all__ = ["main"]

_EXAMPLES = """\
  python -m llava_piip.serve.web --model output/chat_demo/stage2
  python -m llava_piip.serve.web --model output/piip_llava --load-in 4bit
  python -m llava_piip.serve.web --server http://127.0.0.1:8000/v1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`."""
    parser = make_parser("web", __doc__, _EXAMPLES)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default %(default)s")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=2 * DEFAULT_NEW_TOKENS,
        help="longest answer that visitors can set (default %(default)s)",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        from .web_page import build_page, serve_page
        from .web_session import WebChat
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "matplotlib"):
            raise
        hint = "pip install --no-build-isolation -e '.[web]'"
        raise ConfigError(f"the web page needs {error.name}: {hint}") from error
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
    chat = WebChat(load_model(args), system=args.system, max_new_tokens=args.max_new_tokens)
    page = build_page(chat, title=f"PIIP-LLaVA: {Path(args.model or args.server).name}")
    serve_page(page, host=args.host, port=args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
