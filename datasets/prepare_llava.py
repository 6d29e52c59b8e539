#!/usr/bin/env python3
"""Lays out the data sets that PIIP-LLaVA is trained on.

$ python datasets/prepare_llava.py pretrain /data              # stage 1, LCS-558K: unpack, and say what is missing
$ python datasets/prepare_llava.py finetune /data              # stage 2, mix665k
$ python datasets/prepare_llava.py finetune /data --archive gqa=~/Downloads/images.zip
$ python datasets/prepare_llava.py finetune /data --download   # fetch what is missing first; goes on if interrupted

Archives are looked for below the folder (see `Get` in the output) and are not removed. Every step can be repeated; what
is done is not done again. The exit status is 0 if no archive is missing.

The paper's "Plus" model saw about 1.6 million samples more. That mixture is not published in detail, so no command
prepares it. Any number of files in LLaVA's format can be trained on together, each with its own image folder:
--annotations a.json b.json --image_root /data/a /data/b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pretrain", "finetune"), help="LCS-558K (stage 1), or mix665k (stage 2)")
    parser.add_argument("root", type=Path, help="folder that holds all data sets")
    archive = parser.add_argument("--archive", type=_part, action="append", default=[], metavar="PART=FILE")
    archive.help = "an archive that lies elsewhere"
    parser.add_argument("--download", action="store_true", help="download what is missing (tens of gigabytes)")
    parser.add_argument("--follow-links", action="store_true", help="allow links that lead out of the folder")
    return parser.parse_args(argv)


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

    preparation = prepare_published(
        PUBLISHED[args.what],
        args.root,
        archives=dict(args.archive),
        fetch=args.download,
        follow_links=args.follow_links,
    )
    print("\n".join(preparation.done) or "Nothing to unpack.")
    if preparation.renamed:
        print(f"OCR-VQA: {len(preparation.renamed)} images got a second name")
    if preparation.sources:
        print("\nGet")
        for what, source in preparation.sources.items():
            print(f"  {what}: {source}")
        return 1
    print(f"\nNo file is missing. Next: python datasets/verify_llava.py {args.what} {args.root}")
    return 0


def _part(text: str) -> tuple[str, Path]:
    part, separator, file = text.partition("=")
    if not (part and separator and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected PART=FILE, for example gqa=images.zip")
    return part, Path(file).expanduser()


if __name__ == "__main__":
    sys.exit(main())
