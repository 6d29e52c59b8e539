"""Chat completions over HTTP, as clients of OpenAI's interface expect them.

    pip install --no-build-isolation -e ".[serve]"
    python -m llava_piip.serve.server --model output/piip_llava
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "piip_llava", "messages": [{"role": "user", "content": "Hello"}]}'

Answers of all clients are generated together, see llava_piip/serve/engine.py. With the environment variable
PIIP_API_KEY set, or --api-key-file, clients must send that key. Several of it: llava_piip/serve/replicas.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from piip_core.errors import UserError

from .application import ServerSettings, create_app
from .arguments import add_model_arguments, load_model
from .engine import Engine, EngineSettings
from .fetching import FetchPolicy
from .hosts import allowed_names, is_loopback

__all__ = ["add_server_arguments", "engine_settings", "main", "server_settings"]

KEEP_ALIVE = 30  # seconds that a connection may be idle
_KEY_VARIABLE = "PIIP_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the server until SIGTERM or SIGINT; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_piip.serve.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        settings, engine = server_settings(options), engine_settings(options)
        app = create_app(Engine(load_model(options), engine), settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            timeout_graceful_shutdown=options.grace,
            timeout_keep_alive=KEEP_ALIVE,
            server_header=False,
        )
    )
    asyncio.run(server.serve())
    return 0 if server.started else 1


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of one server: those that `load_model`, `server_settings` and `engine_settings` read."""
    add_model_arguments(parser)
    parser.add_argument("--name", help="what clients call the model (default: name of the folder)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="host that requests may be for, once for each (default: without a key and at a loopback address those of "
        "this machine, otherwise any)",
    )
    parser.add_argument("--api-key-file", type=Path, help=f"file with the key (or set {_KEY_VARIABLE})")
    parser.add_argument("--allow-http", action="store_true", help="fetch pictures from http:// addresses, too")
    parser.add_argument("--max-batch", type=int, help="answers generated together (default 32, on a CPU 8)")
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        help="requests that wait; more get 429 (default %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a request (default %(default)s)")
    parser.add_argument("--max-body-mb", type=float, default=32.0, help="largest request (default %(default)s)")
    parser.add_argument("--image-places", type=int, default=64, help="pictures on the device (default %(default)s)")
    parser.add_argument("--cache-tokens", type=int, help="room of the key and value cache (default: most of the GPU)")
    parser.add_argument(
        "--no-prefix-sharing", action="store_true", help="compute prompts that start alike each for itself"
    )
    parser.add_argument("--compile", action="store_true", help="compile steps; first requests wait long, see --timeout")
    parser.add_argument(
        "--grace", type=int, default=30, help="seconds for running answers when the server ends (default %(default)s)"
    )


def server_settings(options: argparse.Namespace) -> ServerSettings:
    """Settings out of the options of `add_server_arguments` and the environment.

    Raises:
        UserError: For a value that cannot work, or a file that cannot be read.
    """
    key = _api_key(options.api_key_file)
    checks_host = options.allowed_host or (key is None and is_loopback(options.host))
    return ServerSettings(
        name=options.name or Path(options.model).resolve().name,
        api_key=key,
        max_waiting=options.max_waiting,
        timeout=options.timeout,
        max_body=int(options.max_body_mb * 1e6),
        fetch=FetchPolicy(allow_http=options.allow_http),
        allowed_hosts=allowed_names(options.allowed_host) if checks_host else None,
    )


def engine_settings(options: argparse.Namespace) -> EngineSettings:
    """Settings out of the options of `add_server_arguments`.

    Raises:
        ConfigError: For a number that cannot work.
    """
    return EngineSettings(
        max_batch=options.max_batch,
        image_places=options.image_places,
        cache_tokens=options.cache_tokens,
        share_prefixes=not options.no_prefix_sharing,
        compiled=options.compile,
    )


def _api_key(file: Path | None) -> str | None:
    if file is None:
        source, key = _KEY_VARIABLE, os.environ.get(_KEY_VARIABLE, "").strip()
    else:
        source = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: cannot be read ({error})") from error
        if not key:
            raise UserError(f"{source}: is empty, expected a key in one line")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{source}: expected a key in one line of ASCII characters, clients send it in a header")
    return key or None


if __name__ == "__main__":
    raise SystemExit(main())
