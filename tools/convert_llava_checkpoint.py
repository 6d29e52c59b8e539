"""Converts released PIIP-LLaVA checkpoints into folders that from_pretrained loads, and back.

Examples:
    python tools/convert_llava_checkpoint.py PIIP-LLaVA_CLIP-BL_512-256_7B output/piip_llava_clip_bl
    python tools/convert_llava_checkpoint.py RELEASED output/model --row piip_llava_convnext_b_clip_l_1024_336_7b
    python tools/convert_llava_checkpoint.py RELEASED output/model --vision-config RELEASED/config.py
    python tools/convert_llava_checkpoint.py output/model public --to-public

The source is a folder as published: config.json, weights (sharded or not), tokenizer files. Which row it is, is
recognised by the shapes of its tensors, or named; a vision configuration in Python is read without being run. Every key
is used or listed with the reason why it is not needed; anything else is an error. Tensors are read and written one at a
time, in the types they have.
"""

from __future__ import annotations

import argparse
import sys

from llava_piip.checkpoints import convert_folder, export_folder
from piip_core.errors import NotSupportedYet, UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder to convert")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--row", help="name of the published row (default: recognised)")
    parser.add_argument("--vision-config", metavar="FILE", help="the published vision configuration, a Python file")
    parser.add_argument("--to-public", action="store_true", help="from our names to the published ones")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    args = parser.parse_args(argv)
    if args.to_public and (args.row or args.vision_config):
        parser.error("--row and --vision-config do not go with --to-public: the folder says what it holds")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.to_public:
            done = export_folder(args.source, args.target, overwrite=args.overwrite)
        else:
            done = convert_folder(
                args.source,
                args.target,
                row=args.row,
                vision_config=args.vision_config,
                overwrite=args.overwrite,
            )
    except (UserError, NotSupportedYet) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(done.report.summary())
    print(f"{done.model}; written to {done.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
