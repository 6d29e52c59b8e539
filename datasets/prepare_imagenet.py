#!/usr/bin/env python3
"""Lays out ImageNet-1K (ILSVRC2012) with one folder per class.

$ python datasets/prepare_imagenet.py /data                        # unpacks the official archives in /data
$ python datasets/prepare_imagenet.py /data --archives ~/Downloads

The archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which has the classes
of the validation images. They are not removed. Each set appears when all of it is unpacked.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from script_arguments import add_root, errors_as_messages, new_parser

ADVICE = "Archives are given out at https://image-net.org/download to those who accept its terms; --archives DIR says "


def unpack(name: str, source: Path, folder: Path) -> None:
    """Unpacks "train" or "val" from the archives in `source`, after comparing their checksums."""
    from torchvision.datasets import imagenet

    if name == "train":
        imagenet.parse_train_archive(str(source), folder=str(folder))
        return
    devkit = source / imagenet.ARCHIVE_META["devkit"][0]
    with tempfile.TemporaryDirectory() as scratch:
        imagenet.parse_devkit_archive(scratch, str(devkit))
        classes = imagenet.load_meta_file(scratch)[1]
    imagenet.parse_val_archive(str(source), wnids=classes, folder=str(folder))


def main(argv: list[str] | None = None) -> int:
    """Unpacks what the command line names, and returns the exit status."""
    parser = new_parser(__doc__)
    add_root(parser)
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives, if it is another")
    args = parser.parse_args(argv)
    from piip_core.files import publish_folder  # loads torch: not for --help

    source = (args.archives or args.root).absolute()
    for name in ("train", "val"):
        folder = args.root.absolute() / "imagenet" / name
        if folder.is_dir() and any(folder.iterdir()):
            print(f"{folder}: already there")
            continue
        print(f"{folder}: comparing checksums and unpacking", flush=True)
        try:
            with errors_as_messages(), publish_folder(folder, durable=False) as aside:
                unpack(name, source, aside)
                os.sync()  # the new name must not be on the disk before the files are; once, not for each of a million
        except RuntimeError as error:  # of torchvision, for an archive that is missing or has another checksum
            sys.exit(f"error: {error} {ADVICE}where they are")
    print(f"Next: python datasets/verify_imagenet.py {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
