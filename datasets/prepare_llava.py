#!/usr/bin/env python3
"""Lays out the data sets that PIIP-LLaVA is trained on.

$ python datasets/prepare_llava.py pretrain /data              # stage 1, LCS-558K: unpack, and say what is missing
$ python datasets/prepare_llava.py finetune /data              # stage 2, mix665k
$ python datasets/prepare_llava.py finetune /data --archive gqa=~/Downloads/images.zip
$ python datasets/prepare_llava.py finetune /data --download   # fetch what is missing first; goes on if interrupted

Archives are looked for below the folder (see `Get` in the output) and are not removed. Every step can
be repeated; what is done is not done again. The exit status is 0 if nothing is missing.

The paper's "Plus" model saw about 1.6 million samples more. That mixture is not published in detail, so no command
prepares it. Any number of files in LLaVA's format can be trained on together, each with its own image folder:
--annotations a.json b.json --image_root /data/a /data/b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from llava_piip.data.preparation import Preparation

SETS = {"pretrain": "LCS-558K (stage 1)", "finetune": "mix665k of LLaVA-1.5 (stage 2)"}
LISTED = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="{pretrain,finetune}")
    for name, title in SETS.items():
        command = commands.add_parser(name, help=title, description=f"Lays out {title}.")
        command.add_argument("root", type=Path, help="folder that holds all data sets")
        archive = command.add_argument("--archive", type=_part, action="append", default=[], metavar="PART=FILE")
        archive.help = "an archive that lies elsewhere"
        command.add_argument("--download", action="store_true", help="download what is missing (tens of gigabytes)")
        command.add_argument("--follow-links", action="store_true", help="allow links that lead out of the folder")
        command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    args = parse_args(argv)
    # Here and below what loads torch and transformers: not for --help
    from piip_core.errors import UserError

    try:
        return _prepare(args)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def _prepare(args: argparse.Namespace) -> int:
    from llava_piip.data.preparation import prepare_published
    from llava_piip.data.published import PUBLISHED

    options = {"fetch": args.download, "follow_links": args.follow_links}
    preparation = prepare_published(
        PUBLISHED[args.what], args.root, archives=dict(args.archive), workers=args.workers, **options
    )
    _print(preparation)
    if preparation.complete:
        print(f"\nNo image is missing. Next: python datasets/verify_llava.py {args.what} {args.root}")
    return 0 if preparation.complete else 1


def _print(preparation: Preparation) -> None:
    print("\n".join(preparation.done) or "Nothing to unpack.")
    if preparation.renamed or preparation.broken:
        print(
            f"OCR-VQA: {len(preparation.renamed)} images got a second name, {len(preparation.broken)} are there under "
            "another name but broken"
        )
        for name, reason in list(preparation.broken.items())[:LISTED]:
            print(f"  {name}: {reason}")
    if preparation.report is not None:
        (summary,) = preparation.report.files
        rows = [
            (folder, images, summary.unusable_by_folder[folder])
            for folder, images in sorted(summary.images_by_folder.items())
        ]
        print(f"\n{summary.file}: {summary.entries} entries")
        print(tabulate(rows, ["images in", "named", "missing"], "github"))
        missing = [f.image for f in preparation.report.problems if f.image is not None]
        for name in list(dict.fromkeys(missing))[:LISTED]:
            print(f"  missing: {name}")
    if preparation.sources:
        print("\nGet")
        for what, source in preparation.sources.items():
            print(f"  {what}: {source}")


def _part(text: str) -> tuple[str, Path]:
    part, separator, file = text.partition("=")
    if not (part and separator and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected PART=FILE, for example gqa=images.zip")
    return part, Path(file).expanduser()


if __name__ == "__main__":
    sys.exit(main())
