"""What the scripts of this folder share; each is started alone and finds this file beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_root(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of all data sets."""
    parser.add_argument(
        "root",
        nargs="?",
        type=Path,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser(),
        help="folder that holds all data sets (default: $DETECTRON2_DATASETS, here %(default)s)",
    )


@contextmanager
def errors_as_messages(advice: str = "") -> Iterator[None]:
    """Ends the script with a message for what its user can mend."""
    from piip_core.errors import UserError  # loads torch: not for --help

    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}{advice}")
