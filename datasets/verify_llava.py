#!/usr/bin/env python3
"""Checks conversation files in LLaVA's format and their images, and says everything that is wrong.

$ python datasets/verify_llava.py pretrain /data                   # LCS-558K, prepared by prepare_llava.py
$ python datasets/verify_llava.py finetune /data --decode full     # mix665k, and decode every image
$ python datasets/verify_llava.py files --annotations a.json b.json --image_root /data/a /data/b
$ python datasets/verify_llava.py finetune /data --report report.json --clean /data/clean665k.json

--clean writes a conversation file without the entries that have a problem. The exit status is 0 if everything is in
order, 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from script_arguments import add_decode, add_report_options, check_report_options, errors_as_messages, new_parser, tell


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    common = argparse.ArgumentParser(add_help=False)
    add_decode(common)
    add_report_options(common)
    common.add_argument("--clean", type=Path, metavar="FILE", help="write entries without a problem (.json, .jsonl)")
    common.add_argument("--follow-links", action="store_true", help="allow links that lead out of the image folder")
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="{pretrain,finetune,files}")
    for name, title in (("pretrain", "LCS-558K"), ("finetune", "mix665k of LLaVA-1.5")):
        command = commands.add_parser(name, parents=[common], help=f"{title}, with its published sizes")
        command.add_argument("root", type=Path, help="folder that holds all data sets")
    files = commands.add_parser("files", parents=[common], help="any conversation files")
    files.add_argument("--annotations", nargs="+", required=True, metavar="FILE", help=".json or .jsonl")
    roots = files.add_argument("--image-root", "--image_root", nargs="+", required=True, metavar="FOLDER")
    roots.help = "one for all files, or one for each"
    args = parser.parse_args(argv)
    if args.clean and args.what == "files" and len(args.annotations) > 1:
        parser.error(f"--clean {args.clean}: expected a single file in --annotations, not {len(args.annotations)}")
    check_report_options(parser, args, args.clean)
    return args


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    args = parse_args(argv)
    # Loads torch and transformers: not for --help
    from llava_piip.data.audit import audit, write_clean
    from llava_piip.data.published import PUBLISHED

    if args.what == "files":
        published, annotations, roots, advice = None, args.annotations, args.image_root, ""
    else:
        published = PUBLISHED[args.what]
        annotations, roots = [args.root / published.annotations], [args.root / published.image_root]
        advice = f" (prepare_llava.py {args.what} {args.root} says what is missing)"
    options = {"decode": args.decode, "workers": args.workers, "follow_links": args.follow_links}
    with errors_as_messages(advice):
        report = audit(annotations, roots, published=published, **options)
        status = tell(report, args)
        if args.clean:
            number = write_clean(report, annotations[0], args.clean)
            print(f"\n{args.clean}: {number} of {report.files[0].entries} entries")
    return status


if __name__ == "__main__":
    sys.exit(main())
