#!/usr/bin/env python3
"""Reads the files of a data set, and says everything that is wrong with them.

$ python datasets/verify.py ade20k /data                                 # images and label maps
$ python datasets/verify.py ade20k --images DIR --labels DIR --classes names.txt
$ python datasets/verify.py imagenet /data --count-only                  # seconds instead of an hour
$ python datasets/verify.py imagenet --images my/train my/val
$ python datasets/verify.py llava-pretrain /data                         # LCS-558K
$ python datasets/verify.py llava-finetune /data --decode full           # mix665k, and decode every image
$ python datasets/verify.py llava-finetune /data --report report.json
$ python datasets/verify.py llava-files --annotations a.json b.json --image_root /data/a /data/b
$ python datasets/verify.py llava-eval all /data/eval                    # the eight published benchmarks
$ python datasets/verify.py llava-eval pope gqa /data/eval --report report.json

The exit status is 0 if everything is in order, 1 if something is wrong; a class that never occurs is a warning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from script_arguments import add_root, errors_as_messages

ADE20K = {"training": 20_210, "validation": 2_000}  # published images
IMAGENET = {"train": (1000, 1_281_167), "val": (1000, 50_000)}  # published classes and images


def _shared_options() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Options of all commands, and of those that may read images in part."""
    report = argparse.ArgumentParser(add_help=False)
    report.add_argument("--workers", type=int, metavar="N", help="files read at the same time (default: one per core)")
    report.add_argument("--report", type=Path, metavar="FILE.json", help="write everything found, file by file")
    report.add_argument("--force", action="store_true", help="let the report replace another file")
    report.add_argument("--examples", type=int, default=3, metavar="N", help="shown of each kind (default: 3)")
    decode = argparse.ArgumentParser(add_help=False)
    decode.add_argument(
        "--decode",
        choices=("none", "header", "full"),
        default="header",
        help="how far images are read: not at all (they exist, are not empty and lie in their folder), their header "
        "(default; finds files that are no images), or to the end (finds truncated ones)",
    )
    return report, decode


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    report, decode = _shared_options()
    llava = argparse.ArgumentParser(add_help=False, parents=[report, decode])
    llava.add_argument("--follow-links", action="store_true", help="allow links that lead out of the image folder")
    llava.set_defaults(audit=audit_llava)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    ade20k = commands.add_parser("ade20k", parents=[report], help="ADE20K, or own images and label maps")
    add_root(ade20k)
    own = ade20k.add_argument_group("your own data, instead of ADE20K")
    own.add_argument("--images", metavar="DIR", help="folder of images")
    own.add_argument("--labels", metavar="DIR", help="folder of label maps: .png, named as the images")
    own.add_argument("--classes", metavar="FILE|N|ade20k", help="text file with one name per line, or their number")
    own.add_argument(
        "--reduce-zero-label", action="store_true", default=None, help="0 is ignored and class k has the value k + 1"
    )
    ade20k.set_defaults(audit=audit_ade20k)
    imagenet = commands.add_parser("imagenet", parents=[report], help="ImageNet-1K, or own folders of classes")
    add_root(imagenet)
    imagenet.add_argument("--images", nargs="+", metavar="DIR", help="your own folders instead of ImageNet")
    imagenet.add_argument("--count-only", action="store_true", help="count the images of every class, read none")
    imagenet.set_defaults(audit=audit_imagenet)
    for name, title in (("pretrain", "LCS-558K"), ("finetune", "mix665k of LLaVA-1.5")):
        command = commands.add_parser(f"llava-{name}", parents=[llava], help=f"{title}, with its published sizes")
        command.add_argument("root", type=Path, help="folder that holds all data sets")
    files = commands.add_parser("llava-files", parents=[llava], help="any conversation files in LLaVA's format")
    files.add_argument("--annotations", nargs="+", required=True, metavar="FILE", help=".json or .jsonl")
    roots = files.add_argument("--image-root", "--image_root", nargs="+", required=True, metavar="FOLDER")
    roots.help = "one for all files, or one for each"
    benchmarks = commands.add_parser("llava-eval", parents=[report, decode], help="benchmarks of PIIP-LLaVA")
    benchmarks.add_argument("benchmarks", nargs="+", metavar="BENCHMARK", help="names as of llava_piip.eval, or all")
    benchmarks.add_argument("root", type=Path, help="folder of all benchmarks")
    benchmarks.set_defaults(audit=audit_benchmarks)

    args = parser.parse_args(argv)
    if args.what == "ade20k" and len({bool(each) for each in (args.images, args.labels, args.classes)}) > 1:
        parser.error("your own data: expected all of --images, --labels and --classes")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    if args.report is not None and args.report.exists() and not args.force:
        parser.error(f"{args.report} exists: choose another name, or add --force")
    return args


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    args = parse_args(argv)
    advice = ""
    if args.what in ("llava-pretrain", "llava-finetune"):
        advice = f" (prepare.py {args.what} {args.root} says what is missing)"
    with errors_as_messages(advice):
        found = args.audit(args)
        print(found.summary(examples=args.examples))
        if args.report:
            found.write_json(args.report)
            print(f"\nReport: {args.report}")
        print(f"\n{found.verdict()}")
    return 0 if found.ok else 1


# What follows loads torch and Detectron2 or transformers: not for --help


def audit_ade20k(args: argparse.Namespace) -> Any:
    """Reads the images and label maps of ADE20K or of own folders."""
    from piip.data.audit import Audit, audit_label_maps
    from piip.data.label_maps import label_classes

    if args.images:
        given = int(args.classes) if args.classes.isdecimal() else args.classes
        classes = label_classes(given, args.reduce_zero_label)
        return Audit([audit_label_maps(args.images, args.labels, classes, workers=args.workers)])
    root, classes = args.root / "ADEChallengeData2016", label_classes("ade20k")
    sets = []
    for title, expected in ADE20K.items():
        folders = (str(root / kind / title) for kind in ("images", "annotations"))
        sets.append(audit_label_maps(*folders, classes, title=title, expected=expected, workers=args.workers))
    return Audit(sets)


def audit_imagenet(args: argparse.Namespace) -> Any:
    """Counts and reads the images of ImageNet or of own folders of classes."""
    from piip.data.audit import audit_classes

    parts = [(name, str(args.root / "imagenet" / name), *sizes) for name, sizes in IMAGENET.items()]
    if args.images:
        parts = [(folder, folder, None, None) for folder in args.images]
    return audit_classes(parts, decode=not args.count_only, workers=args.workers)


def audit_llava(args: argparse.Namespace) -> Any:
    """Checks conversation files and their images."""
    from llava_piip.data.audit import audit
    from llava_piip.data.published import PUBLISHED

    options = {"decode": args.decode, "workers": args.workers, "follow_links": args.follow_links}
    if args.what == "llava-files":
        return audit(args.annotations, args.image_root, **options)
    published = PUBLISHED[args.what.removeprefix("llava-")]
    files = [args.root / published.annotations], [args.root / published.image_root]
    return audit(*files, published=published, **options)


def audit_benchmarks(args: argparse.Namespace) -> Any:
    """Checks questions, labels and images of benchmarks: files, numbers, repetitions, what belongs together."""
    from llava_piip.eval import find_benchmarks
    from llava_piip.eval.data_check import check_benchmarks

    return check_benchmarks(find_benchmarks(args.benchmarks), args.root, decode=args.decode, workers=args.workers)


if __name__ == "__main__":
    sys.exit(main())
