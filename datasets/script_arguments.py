"""Options and output that the scripts of this folder share; each is started alone and finds this file beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_root(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of all data sets."""
    parser.add_argument(
        "root",
        nargs="?",
        type=Path,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser(),
        help="folder that holds all data sets (default: $DETECTRON2_DATASETS, here %(default)s)",
    )


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Adds how far images are read."""
    parser.add_argument(
        "--decode",
        choices=("none", "header", "full"),
        default="header",
        help="how far images are read: not at all (they exist, are not empty and lie in their folder), their header "
        "(default; finds files that are no images), or to the end (finds truncated ones)",
    )


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Adds how much is read at a time, and what is told of what was found."""
    parser.add_argument("--workers", type=int, metavar="N", help="files read at the same time (default: one per core)")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write everything found, file by file")
    parser.add_argument("--force", action="store_true", help="let files that are written replace others")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="shown of each kind (default: 3)")


def check_report_options(parser: argparse.ArgumentParser, args: argparse.Namespace, *more: Path | None) -> None:
    """Ends with a usage error for a wrong number, or if the report or one of `more` files is there already."""
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    for path in (args.report, *more):
        if path is not None and path.exists() and not args.force:
            parser.error(f"{path} exists: choose another name, or add --force")


def tell(found: Any, args: argparse.Namespace) -> int:
    """Prints what an audit found, writes the report that is asked for, and returns the exit status."""
    print(found.summary(examples=args.examples))
    if args.report:
        found.write_json(args.report)
        print(f"\nReport: {args.report}")
    print(f"\n{found.verdict()}")
    return 0 if found.ok else 1


@contextmanager
def errors_as_messages(advice: str = "") -> Iterator[None]:
    """Ends the script with a message for what its user can mend."""
    from piip_core.errors import UserError  # loads torch: not for --help

    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}{advice}")
