"""Talks in the browser with a trained or converted model, or with one behind an OpenAI-compatible server.

Images and questions, answers as they are generated, and (without --server) what each branch of the vision tower looked
at. The page is served to this machine only unless --host says otherwise; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from piip_core.errors import ConfigError, UserError

from .chat import load_model, make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`."""
    parser = make_parser("web", __doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default %(default)s")
    args = parser.parse_args(arguments)
    try:
        try:
            from .web_page import build_page, serve_page
        except ModuleNotFoundError as error:
            if error.name not in ("gradio", "matplotlib"):
                raise
            hint = "pip install --no-build-isolation -e '.[web]'"
            raise ConfigError(f"the web page needs {error.name}: {hint}") from error
        chat = load_model(args)
        page = build_page(chat, title=f"PIIP-LLaVA: {Path(args.model or chat.name).name}", system=args.system)
        serve_page(page, host=args.host, port=args.port).block_thread()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
