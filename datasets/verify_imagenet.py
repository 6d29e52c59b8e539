#!/usr/bin/env python3
"""Counts and reads every image of ImageNet-1K, or of your own folders of classes, and says everything that is wrong.

$ python datasets/verify_imagenet.py /data                         # prepared by prepare_imagenet.py
$ python datasets/verify_imagenet.py /data --count-only            # seconds instead of an hour
$ python datasets/verify_imagenet.py --images my/train my/val
$ python datasets/verify_imagenet.py /data --report report.json

The exit status is 0 if everything is in order, 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import sys

from script_arguments import add_report_options, add_root, check_report_options, errors_as_messages, tell


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_root(parser)
    parser.add_argument("--images", nargs="+", metavar="DIR", help="your own folders instead of ImageNet")
    parser.add_argument("--count-only", action="store_true", help="count the images of every class, read none")
    add_report_options(parser)
    args = parser.parse_args(argv)
    check_report_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    args = parse_args(argv)
    # Loads torch and Detectron2: not for --help
    from piip.data.classification.audit import audit_classes
    from piip.data.classification.imagenet import audit_imagenet

    options = {"decode": not args.count_only, "workers": args.workers}
    with errors_as_messages():
        if not args.images:
            return tell(audit_imagenet(args.root, **options), args)
        return tell(audit_classes([(folder, folder, None, None) for folder in args.images], **options), args)


if __name__ == "__main__":
    sys.exit(main())
