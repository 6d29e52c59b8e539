#!/usr/bin/env python3
"""Reads every image and label map of ADE20K, or of your own data, and says everything that is wrong.

$ python datasets/verify_ade20k.py /data                           # prepared by prepare_ade20k.py
$ python datasets/verify_ade20k.py --images DIR --labels DIR --classes names.txt
$ python datasets/verify_ade20k.py /data --report report.json

The exit status is 0 if no file is wrong, 1 if something is; a class that never occurs is a warning.
"""

from __future__ import annotations

import argparse
import sys

from script_arguments import add_report_options, add_root, check_report_options, errors_as_messages, tell


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_root(parser)
    own = parser.add_argument_group("your own data, instead of ADE20K")
    own.add_argument("--images", metavar="DIR", help="folder of images")
    own.add_argument("--labels", metavar="DIR", help="folder of label maps: .png, named as the images")
    own.add_argument("--classes", metavar="FILE|N|ade20k", help="text file with one name per line, or their number")
    own.add_argument(
        "--reduce-zero-label", action="store_true", default=None, help="0 is ignored and class k has the value k + 1"
    )
    add_report_options(parser)
    args = parser.parse_args(argv)
    own_data = [args.images, args.labels, args.classes]
    if any(own_data) and not all(own_data):
        parser.error("your own data: expected all of --images, --labels and --classes")
    check_report_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    args = parse_args(argv)
    # Loads torch and Detectron2: not for --help
    from piip.data.audit import Audit
    from piip.data.segmentation.ade20k import audit_ade20k
    from piip.data.segmentation.audit import audit_label_maps
    from piip.data.segmentation.classes import label_classes

    with errors_as_messages():
        if not args.images:
            return tell(audit_ade20k(args.root, workers=args.workers), args)
        given = int(args.classes) if args.classes.isdecimal() else args.classes
        classes = label_classes(given, args.reduce_zero_label)
        return tell(Audit([audit_label_maps(args.images, args.labels, classes, workers=args.workers)]), args)


if __name__ == "__main__":
    sys.exit(main())
