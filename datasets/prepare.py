#!/usr/bin/env python3
"""Lays out the data sets: unpacks archives, and downloads where it may.

$ python datasets/prepare.py digits                               # 2000 + 200 scenes in datasets/digits; no download
$ python datasets/prepare.py digits my/folder --num-train 500 --image-size 256
$ python datasets/prepare.py digits --yolo my/digits               # boxes, as YOLO has them
$ python datasets/prepare.py digits --single                      # the 1797 digits on their own, a folder per class
$ python datasets/prepare.py ade20k /data                         # unpacks /data/ADEChallengeData2016.zip
$ python datasets/prepare.py ade20k /data --download              # fetches it first; goes on if interrupted
$ python datasets/prepare.py imagenet /data --archives ~/Downloads
$ python datasets/prepare.py llava-pretrain /data                 # stage 1, LCS-558K: unpack, and say what is missing
$ python datasets/prepare.py llava-finetune /data --archive gqa=~/Downloads/images.zip

Archives are looked for below the folder and are not removed. Every command can be repeated; what is done is not done
again. The exit status is 0 if nothing is missing. The paper's "Plus" model saw about 1.6 million samples more than
LLaVA-1.5: that mixture is not published in detail, so no command prepares it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from script_arguments import add_root, errors_as_messages

ADE20K = "ADEChallengeData2016"
ADE20K_URL = f"http://data.csail.mit.edu/places/ADEchallenge/{ADE20K}.zip"
IMAGENET_ADVICE = "Archives are given out at https://image-net.org/download to those who accept its terms"
LLAVA = {"llava-pretrain": "LCS-558K (stage 1)", "llava-finetune": "mix665k of LLaVA-1.5 (stage 2)"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    digits = commands.add_parser("digits", help="handwritten digits on photographs, in COCO's layout, with label maps")
    digits.add_argument("root", nargs="?", type=Path, help="folder to write (default digits or digit_images here)")
    digits.add_argument("--single", action="store_true", help="single digits without photographs, for classifiers")
    digits.add_argument("--yolo", action="store_true", help="boxes in text files and a data.yaml, as YOLO has them")
    for name, default, what in (
        ("--num-train", 2000, "training scenes"),
        ("--num-val", 200, "validation scenes"),
        ("--image-size", 192, "side in pixels"),
        ("--max-digits", 6, "digits per scene"),
        ("--seed", 0, "of all that is random"),
    ):
        digits.add_argument(name, type=int, default=default, help=f"{what} (default %(default)s)")
    digits.set_defaults(run=prepare_digits)
    ade20k = commands.add_parser("ade20k", help="ADE20K (SceneParse150)")
    add_root(ade20k)
    ade20k.add_argument("--archive", type=Path, metavar="FILE", help="the archive, if it is at another place")
    ade20k.add_argument("--download", action="store_true", help="download the archive if it is missing (0.9 GB)")
    ade20k.set_defaults(run=prepare_ade20k)
    imagenet = commands.add_parser("imagenet", help="ImageNet-1K (ILSVRC2012), from its three official archives")
    add_root(imagenet)
    imagenet.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives, if it is another")
    imagenet.set_defaults(run=prepare_imagenet)
    _add_llava(commands)
    return parser.parse_args(argv)


def _add_llava(commands: Any) -> None:
    for name, title in LLAVA.items():
        command = commands.add_parser(name, help=title, description=f"Lays out {title}.")
        command.add_argument("root", type=Path, help="folder that holds all data sets")
        archive = command.add_argument("--archive", type=_part, action="append", default=[], metavar="PART=FILE")
        archive.help = "an archive that lies elsewhere"
        command.add_argument("--download", action="store_true", help="download what is missing (tens of gigabytes)")
        command.add_argument("--follow-links", action="store_true", help="allow links that lead out of the folder")
        command.set_defaults(run=prepare_llava)


def _part(text: str) -> tuple[str, Path]:
    part, separator, file = text.partition("=")
    if not (part and separator and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected PART=FILE, for example gqa=images.zip")
    return part, Path(file).expanduser()


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    args = parse_args(argv)
    with errors_as_messages():
        return args.run(args)


# What follows loads torch and what else it needs: not for --help


def prepare_digits(args: argparse.Namespace) -> int:
    """Draws the digit scenes, or writes the single digits."""
    from piip_digits import data_sets
    from piip_digits.scenes import SceneConfig

    root = args.root or Path(__file__).parent / ("digit_images" if args.single else "digits")
    if args.single:
        written = data_sets.prepare_digit_images(root)
    else:
        config = SceneConfig(image_size=args.image_size, max_digits=args.max_digits, seed=args.seed)
        prepare = data_sets.prepare_yolo_digits if args.yolo else data_sets.prepare_digits
        written = prepare(root, num_train=args.num_train, num_val=args.num_val, config=config)
    print(f"{root}: {'written' if written else 'already there'}")
    return 0


def prepare_ade20k(args: argparse.Namespace) -> int:
    """Unpacks ADE20K's archive; goes on where an interrupted command stopped."""
    from piip_core.archives import download, unpack_images

    folder, archive = args.root / ADE20K, args.archive or args.root / f"{ADE20K}.zip"
    if args.download and not args.archive:
        download(ADE20K_URL, archive)
    if not archive.is_file():
        sys.exit(f"error: {archive}: no such file. Download {ADE20K_URL}, or add --download; --archive FILE names it")
    done = unpack_images(archive, folder)
    print(f"{folder}: {done.written} files unpacked, {done.present} were there")
    print(f"Next: python datasets/verify.py ade20k {args.root}")
    return 0


def prepare_imagenet(args: argparse.Namespace) -> int:
    """Unpacks ImageNet's archives; each of the two sets appears when all of it is there."""
    from piip_core.files import publish_folder

    source = (args.archives or args.root).absolute()
    for name in ("train", "val"):
        folder = args.root.absolute() / "imagenet" / name
        if folder.is_dir() and any(folder.iterdir()):
            print(f"{folder}: already there")
            continue
        print(f"{folder}: comparing checksums and unpacking", flush=True)
        with publish_folder(folder, durable=False) as aside:
            unpack_imagenet(name, source, aside)
            os.sync()  # the new name must not be on the disk before the files are; once, not for each of a million
    print(f"Next: python datasets/verify.py imagenet {args.root}")
    return 0


def unpack_imagenet(name: str, source: Path, folder: Path) -> None:
    """Unpacks "train" or "val" from the archives in `source`, after comparing their checksums."""
    from torchvision.datasets import imagenet

    try:
        if name == "train":
            imagenet.parse_train_archive(str(source), folder=str(folder))
            return
        with tempfile.TemporaryDirectory() as scratch:
            imagenet.parse_devkit_archive(scratch, str(source / imagenet.ARCHIVE_META["devkit"][0]))
            classes = imagenet.load_meta_file(scratch)[1]
        imagenet.parse_val_archive(str(source), wnids=classes, folder=str(folder))
    except RuntimeError as error:  # for an archive that is missing or has another checksum
        sys.exit(f"error: {error} {IMAGENET_ADVICE}; --archives DIR says where they are")


def prepare_llava(args: argparse.Namespace) -> int:
    """Unpacks what PIIP-LLaVA is trained on, and says what is missing."""
    from llava_piip.data.published import PUBLISHED, prepare_published

    preparation = prepare_published(
        PUBLISHED[args.what.removeprefix("llava-")],
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
    print(f"\nNo file is missing. Next: python datasets/verify.py {args.what} {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
