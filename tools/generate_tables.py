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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from piip_core import zoo
from piip_core.files import atomic_path
from piip_tools.flops import (
    ClassificationRow,
    MultimodalRow,
    ZooRow,
    analyze_classifiers,
    analyze_multimodal,
    analyze_zoo,
    classification_table,
    multimodal_table,
    published_tables,
    replace_block,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "projects/PIIP/configs"
READMES = (ROOT / "projects/PIIP/README.md", ROOT / "llava_piip/README.md")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=READMES, help="default: both READMEs")
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a file is out of date")
    return parser.parse_args(argv)


def zoo_rows() -> list[ZooRow]:
    return counted(analyze_zoo, zoo.entries())


def classification_rows() -> list[ClassificationRow]:
    return counted(analyze_classifiers, zoo.classification_entries())


def multimodal_rows() -> list[MultimodalRow]:
    return counted(analyze_multimodal, zoo.multimodal_entries())


def counted(analyze: Callable[[Iterable[Any]], Iterator[Any]], entries: tuple[Any, ...]) -> list[Any]:
    return list(tqdm(analyze(entries), total=len(entries), unit="model", disable=None))


def zoo_tables(rows: list[ZooRow], path: Path) -> str:
    """The tables, with config links relative to the file they stand in."""

    return published_tables(rows, lambda row: config_link(zoo.get(row.name).config_file, path))


def config_link(config_file: str, path: Path) -> str:
    """A link to a config, relative to the file it stands in."""
    return f"[config]({Path(os.path.relpath(CONFIGS / config_file, path.resolve().parent)).as_posix()})"


def classification_tables(rows: list[ClassificationRow], path: Path) -> str:
    """The table, with config links relative to the file it stands in."""
    return classification_table(rows, lambda row: config_link(row.entry.config_file, path))


# Name of a block: how its models are counted, and how they become the text in a file
BLOCKS: Mapping[str, tuple[Callable[[], list[Any]], Callable[[list[Any], Path], str]]] = {
    "zoo table": (zoo_rows, zoo_tables),
    "classification table": (classification_rows, classification_tables),
    "multimodal table": (multimodal_rows, lambda rows, path: multimodal_table(rows)),
}


def read(path: Path) -> tuple[str, list[str]]:
    """The text of the file and the blocks in it, with their markers checked: counting takes a while."""
    try:
        text = path.read_text(encoding="utf-8")
        names = [name for name in BLOCKS if f"{name} -->" in text]
        for name in names or BLOCKS:
            replace_block(text, name, "")
    except (OSError, ValueError) as error:
        sys.exit(f"generate_tables: {path}: {error}")
    return text, names


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    files = {path: read(path) for path in args.files}
    rows = {name: BLOCKS[name][0]() for name in BLOCKS if any(name in names for _, names in files.values())}
    stale = 0
    for path, (text, names) in files.items():
        fresh = text
        for name in names:
            fresh = replace_block(fresh, name, BLOCKS[name][1](rows[name], path))
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
