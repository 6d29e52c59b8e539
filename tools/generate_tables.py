"""Writes the tables of published models between the markers of the projects' READMEs.

Examples:
    python tools/generate_tables.py            # rewrites projects/PIIP/README.md and llava_piip/README.md
    python tools/generate_tables.py --check    # changes nothing; exit status 1 if a table is out of date

A table goes between the lines `<!-- BEGIN NAME -->` and `<!-- END NAME -->`; "zoo table" is the name of the dense
models, "classification table" that of the classifiers, "multimodal table" that of the multimodal ones, "beyond table"
that of models newer than the paper. Only those that a file has markers for are counted.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from piip_core import zoo
from piip_core.files import write_atomically
from piip_tools.flops import tables

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
READMES = (ROOT / "projects/PIIP/README.md", ROOT / "llava_piip/README.md")

# Name of a block: its models, what counts them, and what makes a table of them and of a function that makes links
BLOCKS = {
    "zoo table": (zoo.entries, tables.analyze_zoo, tables.published_tables),
    "classification table": (zoo.classification_entries, tables.analyze_zoo, tables.classification_table),
    "beyond table": (zoo.beyond.entries, tables.analyze_zoo, tables.beyond_table),
    "multimodal table": (
        zoo.multimodal_entries,
        tables.analyze_multimodal,
        lambda rows, link: tables.multimodal_table(rows),
    ),
}


@cache
def count(name: str) -> list[Any]:
    """Counts the models of a block."""
    entries, analyze, _ = BLOCKS[name]
    return list(tqdm(analyze(entries()), total=len(entries()), unit="model", disable=None))


def fill_blocks(text: str, path: Path) -> str:
    """The text of a file with fresh tables in its blocks.

    Raises:
        ValueError: Without a block, or where one begins and does not end.
    """

    def link(config: str) -> str:
        return f"[config]({Path(os.path.relpath(CONFIGS / config, path.resolve().parent)).as_posix()})"

    if not any(f"<!-- BEGIN {name} -->" in text for name in BLOCKS):
        raise ValueError(f"{path}: expected a line such as '<!-- BEGIN {next(iter(BLOCKS))} -->'")
    for name, (_, _, table) in BLOCKS.items():
        before, begin, rest = text.partition(f"<!-- BEGIN {name} -->\n")
        if begin:
            end = f"<!-- END {name} -->"
            if end not in rest:
                raise ValueError(f"{path}: expected after {begin.strip()!r} a line {end!r}")
            text = f"{before}{begin}{table(count(name), link).strip()}\n{end}{rest.partition(end)[2]}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=READMES, help="default: both READMEs")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a file is out of date")
    args = parser.parse_args(argv)
    try:
        texts = {path: path.read_text(encoding="utf-8") for path in args.files}
        fresh = {path: fill_blocks(text, path) for path, text in texts.items()}
    except (OSError, ValueError) as error:
        sys.exit(f"generate_tables: {error}")
    stale = [path for path in args.files if fresh[path] != texts[path]]
    for path in stale:
        if args.check:
            print(f"{path}: the table is out of date; run tools/generate_tables.py")
        else:
            with write_atomically(path, "w") as file:
                file.write(fresh[path])
            print(f"{path}: table written")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
