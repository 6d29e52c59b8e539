#!/usr/bin/env python3
"""Counts and reads every image of ImageNet-1K, or of your own folders of classes, and says everything that is wrong.

$ python datasets/verify_imagenet.py /data                         # prepared by prepare_imagenet.py
$ python datasets/verify_imagenet.py /data --count-only            # seconds instead of an hour
$ python datasets/verify_imagenet.py --images my/train my/val
$ python datasets/verify_imagenet.py /data --report report.json

The exit status is 0 if everything is in order, 1 if something is wrong.
"""

from __future__ import annotations

import sys

from script_arguments import add_report_options, add_root, check_report_options, errors_as_messages, new_parser, tell

PUBLISHED = {"train": (1000, 1_281_167), "val": (1000, 50_000)}  # classes and images


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    parser = new_parser(__doc__)
    add_root(parser)
    parser.add_argument("--images", nargs="+", metavar="DIR", help="your own folders instead of ImageNet")
    parser.add_argument("--count-only", action="store_true", help="count the images of every class, read none")
    add_report_options(parser)
    args = parser.parse_args(argv)
    check_report_options(parser, args)
    from piip.data.audit import audit_classes  # loads torch and Detectron2: not for --help

    parts = [(name, str(args.root / "imagenet" / name), *sizes) for name, sizes in PUBLISHED.items()]
    if args.images:
        parts = [(folder, folder, None, None) for folder in args.images]
    with errors_as_messages():
        return tell(audit_classes(parts, decode=not args.count_only, workers=args.workers), args)


if __name__ == "__main__":
    sys.exit(main())
