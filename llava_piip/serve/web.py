"""Talks with a trained or converted model in the browser.

Pictures and questions, answers as they are generated, and what each branch of the vision tower looked at. The page is
served to this machine only unless --host or --share say otherwise; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from piip_core.errors import ConfigError, UserError

from .arguments import add_model_arguments, add_prompt_cache_arguments, exit_status, load_model
from .hosts import is_loopback
from .web_session import WebChat, WebLimits

__all__ = ["main"]

_EPILOG = """examples:
  python -m llava_piip.serve.web --model output/chat_demo/stage2
  python -m llava_piip.serve.web --model output/piip_llava --load-in 4bit --examples photos
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_piip.serve.web",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_prompt_cache_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default %(default)s")
    parser.add_argument(
        "--share",
        action="store_true",
        help="ask Gradio's service for a public address: everybody who has it can use the page, and what is said goes "
        "through that service",
    )
    parser.add_argument("--system", metavar="TEXT", help="message in front, instead of the template's own")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder of example pictures (default: photographs of scikit-image, where it is installed)",
    )
    parser.add_argument("--max-new-tokens", type=int, help="longest answer that visitors can set")
    parser.add_argument("--max-waiting", type=int, help="questions that wait for their turn; more are refused")
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        from .web_page import build_page, find_examples, serve_page
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "matplotlib"):
            raise
        hint = "pip install --no-build-isolation -e '.[web]'"
        raise ConfigError(f"the web page needs {error.name}: {hint}") from error
    chosen = {"max_new_tokens": args.max_new_tokens, "max_waiting": args.max_waiting}
    for name, value in chosen.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    limits = WebLimits(**{name: value for name, value in chosen.items() if value is not None})
    examples = find_examples(args.examples, limits.pictures)
    print(f"loading {args.model} ...", file=sys.stderr, flush=True)
    chat = WebChat(load_model(args, kept_tokens=args.kept_tokens, compiled=args.compile), limits, system=args.system)
    if not is_loopback(args.host):
        print(f"warning: everybody who reaches {args.host} can use the page; it has no password", file=sys.stderr)
    page = build_page(chat, examples=examples, title=f"PIIP-LLaVA: {Path(args.model).resolve().name}")
    serve_page(page, limits, host=args.host, port=args.port, share=args.share)
    return 0


if __name__ == "__main__":
    sys.exit(main())
