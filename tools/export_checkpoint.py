#!/usr/bin/env python
"""Writes a checkpoint of a run under DeepSpeed as one file.

    python tools/export_checkpoint.py output/run/checkpoint-7330 model.safetensors

Without DeepSpeed, and on any machine that has the whole folder. Above 5 GB the file is written in shards with an index.
Training does this by itself at its end (model_final.safetensors).
"""

import argparse
import sys

from piip.deepspeed_training import export_checkpoint
from piip_core.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder checkpoint-N of a run")
    parser.add_argument("target", help=".safetensors or .pth file to write")
    args = parser.parse_args(argv)
    try:
        print(f"written to {export_checkpoint(args.checkpoint, args.target)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
