#!/usr/bin/env python3
"""Lays out ImageNet-1K (ILSVRC2012) with one folder per class.

$ python datasets/prepare_imagenet.py /data                        # unpacks the official archives in /data
$ python datasets/prepare_imagenet.py /data --archives ~/Downloads

The archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which has the classes
of the validation images. They are not removed. Repeated, the command goes on where it stopped.
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
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives, if it is another")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Unpacks what the command line names, and returns the exit status."""
    args = parse_args(argv)
    # Loads torch and Detectron2: not for --help
    from piip.data.classification.imagenet import FOLDER, prepare_imagenet

    with errors_as_messages():
        done = prepare_imagenet(args.root, archives=args.archives)
    for name, images in done.items():
        print(f"{args.root / FOLDER / name}: " + (f"{images} images unpacked" if images else "already there"))
    print(f"Next: python datasets/verify_imagenet.py {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
