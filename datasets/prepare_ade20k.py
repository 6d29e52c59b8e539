#!/usr/bin/env python3
"""Lays out ADE20K (SceneParse150) for semantic segmentation.

$ python datasets/prepare_ade20k.py /data                          # unpacks /data/ADEChallengeData2016.zip
$ python datasets/prepare_ade20k.py /data --archive ~/Downloads/ADEChallengeData2016.zip
$ python datasets/prepare_ade20k.py /data --download               # fetches it first; goes on if interrupted

The archive is not removed. Repeated, the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from script_arguments import add_root, errors_as_messages


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_root(parser)
    parser.add_argument("--archive", type=Path, metavar="FILE", help="the archive, if it is at another place")
    parser.add_argument("--download", action="store_true", help="download the archive if it is missing (0.9 GB)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Unpacks what the command line names, and returns the exit status."""
    args = parse_args(argv)
    # Loads torch and Detectron2: not for --help
    from piip.data.segmentation.ade20k import FOLDER, prepare_ade20k

    with errors_as_messages():
        done = prepare_ade20k(args.root, archive=args.archive, fetch=args.download)
    if done is None:
        print(f"{args.root / FOLDER}: already there")
    else:
        print(f"{args.root / FOLDER}: {done.written} files unpacked, {done.present} were there")
    print(f"Next: python datasets/verify_ade20k.py {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
