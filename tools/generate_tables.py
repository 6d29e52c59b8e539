"""Writes the tables of published models between the markers of the projects' READMEs.

Examples:
    python tools/generate_tables.py            # rewrites projects/PIIP/README.md and llava_piip/README.md
    python tools/generate_tables.py --check    # changes nothing; exit status 1 if a table is out of date

A table goes between the lines `<!-- BEGIN NAME -->` and `<!-- END NAME -->`; "zoo table" is the name of the dense
models, "classification table" that of the classifiers, "multimodal table" that of the multimodal ones. Only those that
a file has markers for are counted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from piip_core import zoo
from piip_core.files import atomic_path
from piip_tools import flops

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
READMES = (ROOT / "projects/PIIP/README.md", ROOT / "llava_piip/README.md")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=READMES, help="default: both READMEs")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a file is out of date")
    return parser.parse_args(argv)


def link_configs(path: Path) -> Callable[[str], str]:
    """What makes a link to a config, relative to the file it stands in."""
    folder = path.resolve().parent
    return lambda config: f"[config]({Path(os.path.relpath(CONFIGS / config, folder)).as_posix()})"


def zoo_tables(rows: Sequence[Any], path: Path) -> str:
    link = link_configs(path)
    return flops.published_tables(rows, lambda row: link(zoo.get(row.name).config_file))


def classification_tables(rows: Sequence[Any], path: Path) -> str:
    link = link_configs(path)
    return flops.classification_table(rows, lambda row: link(row.entry.config_file))


def multimodal_tables(rows: Sequence[Any], path: Path) -> str:
    return flops.multimodal_table(rows)


# Name of a block: its models, what counts them, and how they become the text in a file
BLOCKS = {
    "zoo table": (zoo.entries, flops.analyze_zoo, zoo_tables),
    "classification table": (zoo.classification_entries, flops.analyze_classifiers, classification_tables),
    "multimodal table": (zoo.multimodal_entries, flops.analyze_multimodal, multimodal_tables),
}


def count(name: str) -> list[Any]:
    """Counts the models of a block."""
    entries, analyze, _ = BLOCKS[name]
    return list(tqdm(analyze(entries()), total=len(entries()), unit="model", disable=None))


def read(path: Path) -> tuple[str, list[str]]:
    """The text of the file and the blocks in it, with their markers checked: counting takes a while."""
    try:
        text = path.read_text(encoding="utf-8")
        names = [name for name in BLOCKS if f"{name} -->" in text]
        for name in names or BLOCKS:
            flops.replace_block(text, name, "")
    except (OSError, ValueError) as error:
        sys.exit(f"generate_tables: {path}: {error}")
    return text, names


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    files = {path: read(path) for path in args.files}
    rows = {name: count(name) for name in BLOCKS if any(name in names for _, names in files.values())}
    stale = 0
    for path, (text, names) in files.items():
        fresh = text
        for name in names:
            fresh = flops.replace_block(fresh, name, BLOCKS[name][2](rows[name], path))
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
