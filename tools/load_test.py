#!/usr/bin/env python3
"""Requests per second and times of a server of PIIP-LLaVA under load.

    python -m llava_piip.serve.server --model output/piip_llava &
    python tools/load_test.py --clients 1 8 32 --requests 64

"gain" compares with the first row: with one client the server answers one request at a time. "differing" counts
answers that come out otherwise when they are asked for again alone (one in eight is); other than zero, rounding of
half precision or a mistake of the server. Needs the packages of the extra "test".
"""

import argparse
import asyncio
import os
import sys

from openai import OpenAIError

from llava_piip.serve.load import format_results, measure


def main(arguments: list[str] | None = None) -> int:
    """Prints a table; 1 if requests failed or the server does not answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="default 1 8 32")
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.clients) < 1 or options.requests < 1:
        parser.error("--clients and --requests: expected numbers from 1 on")
    try:
        results = asyncio.run(
            measure(
                options.url,
                clients=options.clients,
                requests=options.requests,
                max_tokens=options.max_tokens,
                api_key=os.environ.get("PIIP_API_KEY", "none"),
            )
        )
    except OpenAIError as error:
        print(f"error: {options.url} does not answer: {error}", file=sys.stderr)
        return 1
    print(format_results(results))
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
