"""Writes the tables of published models between the markers of projects/PIIP/README.md.

Examples:
    python tools/generate_tables.py            # rewrites projects/PIIP/README.md
    python tools/generate_tables.py --check    # changes nothing; exit status 1 if a table is out of date

The tables go between the lines `<!-- BEGIN zoo table -->` and `<!-- END zoo table -->`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from piip_core import zoo
from piip_core.files import atomic_path
from piip_core.flops import ZooRow, analyze_zoo, published_tables, replace_block

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
READMES = (ROOT / "projects/PIIP/README.md",)
BLOCK = "zoo table"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=READMES, help="default: projects/PIIP/README.md")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a file is out of date")
    return parser.parse_args(argv)


def table_for(path: Path, rows: list[ZooRow]) -> str:
    """The tables, with config links relative to the file it stands in."""

    def link(row: ZooRow) -> str:
        config = CONFIGS / zoo.get(row.name).config_file
        return f"[config]({Path(os.path.relpath(config, path.resolve().parent)).as_posix()})"

    return published_tables(rows, link)


def read(path: Path) -> str:
    """The text of the file, after checking that the markers are there: counting takes a while."""
    try:
        text = path.read_text(encoding="utf-8")
        replace_block(text, BLOCK, "")
    except (OSError, ValueError) as error:
        sys.exit(f"generate_tables: {path}: {error}")
    return text


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    texts = {path: read(path) for path in args.files}
    entries = zoo.entries()
    rows = list(tqdm(analyze_zoo(entries), total=len(entries), unit="model", disable=None))
    stale = 0
    for path, text in texts.items():
        fresh = replace_block(text, BLOCK, table_for(path, rows))
        if fresh == text:
            continue
        stale += 1
        if args.check:
            print(f"{path}: the table is out of date; run tools/generate_tables.py")
        else:
            with atomic_path(path) as aside:
                aside.write_text(fresh, encoding="utf-8")
            print(f"{path}: table written")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
