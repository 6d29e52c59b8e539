#!/usr/bin/env python3
"""Lays out the data sets that PIIP-LLaVA is trained on, and makes one of your own images and texts.

$ python datasets/prepare_llava.py pretrain /data              # stage 1, LCS-558K: unpack, and say what is missing
$ python datasets/prepare_llava.py finetune /data              # stage 2, mix665k
$ python datasets/prepare_llava.py finetune /data --archive gqa=~/Downloads/images.zip
$ python datasets/prepare_llava.py finetune /data --download   # fetch what is missing first; goes on if interrupted
$ python datasets/prepare_llava.py own /data/mine captions.csv /data/mine.json

Archives are looked for below the folder (see `Get` in the output) and are not removed. Every step can
be repeated; what is done is not done again. The exit status is 0 if nothing is missing.

The paper's "Plus" model saw about 1.6 million samples more. That mixture is not published in detail, so no command
prepares it. Any number of files in LLaVA's format can be trained on together, each with its own image folder:
--annotations a.json b.json --image_root /data/a /data/b
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from script_arguments import errors_as_messages, new_parser
from tabulate import tabulate

if TYPE_CHECKING:
    from llava_piip.data.preparation import Preparation

SETS = {"pretrain": "LCS-558K (stage 1)", "finetune": "mix665k of LLaVA-1.5 (stage 2)"}
LISTED = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="{pretrain,finetune,own}")
    for name, title in SETS.items():
        command = commands.add_parser(name, help=title, description=f"Lays out {title}.")
        command.add_argument("root", type=Path, help="folder that holds all data sets")
        archive = command.add_argument("--archive", type=_part, action="append", default=[], metavar="PART=FILE")
        archive.help = "an archive that lies elsewhere"
        command.add_argument("--download", action="store_true", help="download what is missing (tens of gigabytes)")
        command.add_argument("--follow-links", action="store_true", help="allow links that lead out of the folder")
        command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
        command.add_argument(
            "--convert",
            action="store_true",
            help="write JPEGs for OCR-VQA images that came as .gif or .png; by default they get a second name, which "
            "keeps their pixels (images are read by content)",
        )
    own = commands.add_parser(
        "own",
        help="a conversation file from a table of your images",
        description="Writes a conversation file. The table is .csv with a header line or .jsonl; its columns are "
        "`file` (relative to IMAGES), and `caption` or `question` and `answer`; `id` may be there.",
    )
    own.add_argument("images", type=Path, help="folder with the images")
    own.add_argument("table", type=Path, help=".csv or .jsonl")
    own.add_argument("output", type=Path, help=".json or .jsonl file to write")
    own.add_argument("--prompt", metavar="TEXT", help="what the user says where there is a caption")
    own.add_argument("--follow-links", action="store_true", help="allow links that lead out of the folder")
    own.add_argument("--force", action="store_true", help="replace OUTPUT")
    args = parser.parse_args(argv)
    if args.what == "own" and args.output.exists() and not args.force:
        parser.error(f"{args.output} exists: choose another name, or add --force")
    if args.what != "own" and args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    args = parse_args(argv)
    with errors_as_messages():
        return _own(args) if args.what == "own" else _published(args)


def _published(args: argparse.Namespace) -> int:
    """Prepares a published data set."""
    # Here and below: loads torch and transformers, not for --help
    from llava_piip.data.preparation import prepare_published
    from llava_piip.data.published import PUBLISHED

    options = {"fetch": args.download, "convert": args.convert, "follow_links": args.follow_links}
    preparation = prepare_published(
        PUBLISHED[args.what], args.root, archives=dict(args.archive), workers=args.workers, **options
    )
    _print(preparation, args.convert)
    if preparation.complete:
        print(f"\nNo image is missing. Next: python datasets/verify_llava.py {args.what} {args.root}")
    return 0 if preparation.complete else 1


def _print(preparation: Preparation, convert: bool) -> None:
    print("\n".join(preparation.done) or "Nothing to unpack.")
    if (names := preparation.names) is not None:
        print(
            f"OCR-VQA: {names.present} images under their names, {len(names.provided)} "
            f"{'were converted' if convert else 'got a second name'}, {len(names.missing)} are missing, "
            f"{len(names.unreadable)} are there under another name but broken"
        )
        for name, reason in list(names.unreadable.items())[:LISTED]:
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


def _own(args: argparse.Namespace) -> int:
    """Writes a conversation file of a table."""
    from llava_piip.data.own_annotations import DEFAULT_PROMPT, records_from_table, write_entries

    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    records = records_from_table(args.table, args.images, prompt=prompt, follow_links=args.follow_links)
    number = write_entries(args.output, map(json.dumps, records))
    print(f"{args.output}: {number} entries. Train with --annotations {args.output} --image_root {args.images}")
    return 0


def _part(text: str) -> tuple[str, Path]:
    part, separator, file = text.partition("=")
    if not (part and separator and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected PART=FILE, for example gqa=images.zip")
    return part, Path(file).expanduser()


if __name__ == "__main__":
    sys.exit(main())
