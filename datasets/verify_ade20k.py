#!/usr/bin/env python3
"""Reads every image and label map of ADE20K, or of your own data, and says everything that is wrong.

$ python datasets/verify_ade20k.py /data                           # prepared by prepare_ade20k.py
$ python datasets/verify_ade20k.py --images DIR --labels DIR --classes names.txt
$ python datasets/verify_ade20k.py /data --report report.json

The exit status is 0 if no file is wrong, 1 if something is; a class that never occurs is a warning.
"""

from __future__ import annotations

import sys

from script_arguments import add_report_options, add_root, check_report_options, errors_as_messages, new_parser, tell

PUBLISHED = {"training": 20_210, "validation": 2_000}


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    parser = new_parser(__doc__)
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
    # Loads torch and Detectron2: not for --help
    from piip.data.audit import Audit, audit_label_maps
    from piip.data.segmentation import label_classes

    with errors_as_messages():
        if args.images:
            given = int(args.classes) if args.classes.isdecimal() else args.classes
            sets, classes = (
                {"label maps": (args.images, args.labels, None)},
                label_classes(given, args.reduce_zero_label),
            )
        else:
            root, classes = args.root / "ADEChallengeData2016", label_classes("ade20k")
            sets = {
                name: (str(root / "images" / name), str(root / "annotations" / name), count)
                for name, count in PUBLISHED.items()
            }
        found = [
            audit_label_maps(images, labels, classes, title=title, expected=count, workers=args.workers)
            for title, (images, labels, count) in sets.items()
        ]
        return tell(Audit(found), args)


if __name__ == "__main__":
    sys.exit(main())
