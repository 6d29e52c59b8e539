#!/usr/bin/env python3
"""Lays out ADE20K (SceneParse150) for semantic segmentation.

$ python datasets/prepare_ade20k.py /data                          # unpacks /data/ADEChallengeData2016.zip
$ python datasets/prepare_ade20k.py /data --archive ~/Downloads/ADEChallengeData2016.zip
$ python datasets/prepare_ade20k.py /data --download               # fetches it first; goes on if interrupted

The archive is not removed. Repeated, the command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from script_arguments import add_root, errors_as_messages, new_parser

NAME = "ADEChallengeData2016"
URL = f"http://data.csail.mit.edu/places/ADEchallenge/{NAME}.zip"


def main(argv: list[str] | None = None) -> int:
    """Unpacks what the command line names, and returns the exit status."""
    parser = new_parser(__doc__)
    add_root(parser)
    parser.add_argument("--archive", type=Path, metavar="FILE", help="the archive, if it is at another place")
    parser.add_argument("--download", action="store_true", help="download the archive if it is missing (0.9 GB)")
    args = parser.parse_args(argv)
    from piip_core.archives import download, unpack_images  # loads torch: not for --help

    folder, archive = args.root / NAME, args.archive or args.root / f"{NAME}.zip"
    with errors_as_messages():
        if args.download and not args.archive:
            download(URL, archive)
        if not archive.is_file():
            sys.exit(f"error: {archive}: no such file. Download {URL}, or add --download; --archive FILE names it")
        done = unpack_images(archive, folder)
    print(f"{folder}: {done.written} files unpacked, {done.present} were there")
    print(f"Next: python datasets/verify_ade20k.py {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
