"""Converts released PIIP checkpoints to this project's names, and back.

Examples:
    python tools/convert_checkpoint.py mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16.pth tsb.pth
    python tools/convert_checkpoint.py released.pth backbone.safetensors --backbone-only
    python tools/convert_checkpoint.py deepspeed_run/ model.safetensors --dtype float32
    python tools/convert_checkpoint.py output/model_final.pth public.pth --to-public --config piip_tsb_1568_1120_672

Which model the file holds is recognised by the shapes of its tensors, or named with --config. Every key of the file is
used or listed with the reason why it is not needed; anything else is an error. The LazyConfigs take the converted file
as train.init_checkpoint.

The source is a PyTorch or .safetensors file, a Hugging Face index (*.index.json) or its folder, or a DeepSpeed folder
(ZeRO stage 0 to 3). A .safetensors above 5 GB is written in shards with an index.
"""

from __future__ import annotations

import argparse
import sys

import torch

from piip_core import zoo
from piip_core.checkpoints import convert_file, read_config
from piip_core.checkpoints.branch_names import BRANCH_CLASSES
from piip_core.errors import NotSupportedYet, UserError

DTYPES = ("float32", "bfloat16", "float16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*zoo.names(), *(entry.name for entry in zoo.classification_entries())]
    parser.add_argument("source", help="file, index or folder")
    parser.add_argument("target", help=".pth or .safetensors file to write")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="a .json with PIIPConfig.to_dict() or ClassifierConfig.to_dict(), or one of " + ", ".join(names),
    )
    parser.add_argument("--backbone-only", action="store_true", help="leave neck and heads out")
    parser.add_argument("--to-public", action="store_true", help="convert to the published names")
    parser.add_argument(
        "--branch-classes",
        nargs="+",
        choices=list(BRANCH_CLASSES),
        help="with --to-public and --config: published class of each branch (default: that of its family)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the floating-point tensors (default: as they are)")
    parser.add_argument(
        "--master-weights", action="store_true", help="of a DeepSpeed folder, take the optimizer's fp32 weights"
    )
    parser.add_argument("--ema", action="store_true", help="of a classifier, take the moving average of the weights")
    parser.add_argument("--allow-incomplete", action="store_true", help="write although keys have no explanation")
    parser.add_argument(
        "--unsafe-pickle", action="store_true", help="read files with Python objects; these can run any code"
    )
    args = parser.parse_args(argv)
    if args.branch_classes and not (args.to_public and args.config):
        parser.error("--branch-classes goes with --to-public and --config")
    if args.backbone_only and args.to_public:
        parser.error("--backbone-only does not go with --to-public")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        conversion = convert_file(
            args.source,
            args.target,
            config=read_config(args.config) if args.config else None,
            to_public=args.to_public,
            branch_classes=args.branch_classes,
            backbone_only=args.backbone_only,
            allow_incomplete=args.allow_incomplete,
            unsafe_pickle=args.unsafe_pickle,
            master_weights=args.master_weights,
            ema=args.ema,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
        )
    except (UserError, NotSupportedYet) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(conversion.report.summary())
    print(f"{conversion.model}; written to {conversion.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
