"""Counts parameters and FLOPs of a PIIP model per module, without computing or storing anything (meta device).

Examples:
    python tools/analyze_model.py piip_tsb_1568_1120_672
    python tools/analyze_model.py piip_tsb_1568_1120_672 --input 800 1333 --json
    python tools/analyze_model.py projects/PIIP/configs/COCO/mask_rcnn_vit_b_1024_1x.py model.roi_heads.num_classes=10
    python tools/analyze_model.py --zoo

Units: parameters are absolute numbers in --json and millions in tables; FLOPs are multiply-accumulates (MACs), absolute
in --json and thousand millions in tables. "Published count" is the rule behind the published #Param and #FLOPs (square
image, without merging convolutions and feature pyramid); the other columns are what the model holds and executes on one
image of the --input size after padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from piip_core import zoo
from piip_core.flops import (
    ModelReport,
    analyze_backbone,
    analyze_model,
    analyze_zoo,
    model_table,
    padded_size,
    zoo_table,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help=f"a LazyConfig file, or a published model: {', '.join(zoo.names())}")
    parser.add_argument("overrides", nargs="*", help="of a LazyConfig, as key=value")
    parser.add_argument(
        "--input",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="image size before padding (default: a square of the last branch's size)",
    )
    parser.add_argument("--zoo", action="store_true", help="all published models, with the printed numbers")
    parser.add_argument("--json", action="store_true", help="print JSON with absolute numbers")
    args = parser.parse_intermixed_args(argv)  # options may follow the overrides
    if args.zoo == (args.config is not None):
        parser.error("give either a CONFIG or --zoo")
    if args.zoo and args.input:
        parser.error("--input does not go with --zoo: published models are counted on their own square image")
    if args.overrides and not is_file_name(args.config):
        parser.error(f"overrides {args.overrides} go with a LazyConfig file only")
    if args.input and min(args.input) < 1:
        parser.error(f"--input {args.input[0]} {args.input[1]}: expected two positive numbers of pixels")
    return args


def is_file_name(config: str) -> bool:
    """Whether CONFIG is a LazyConfig file and not the name of a published model."""
    return Path(config).suffix in (".py", ".yaml", ".yml")


def analyze_lazy_config(path: str, overrides: list[str], input_size: list[int] | None) -> ModelReport:
    """Counts the detector of a LazyConfig."""
    try:
        from detectron2.config import instantiate

        from piip.lazy_config import load_config
    except ImportError as error:
        sys.exit(f"analyze_model: {path} is a LazyConfig, which needs Detectron2 ({error}); see README.md")

    with torch.device("meta"):
        model = instantiate(load_config(path, overrides).model)
    divisor = model.backbone.padding_constraints["size_divisibility"]
    size = padded_size(*input_size, divisor) if input_size else None
    return analyze_model(model, size, backbone="backbone")


def analyze(args: argparse.Namespace) -> ModelReport:
    """Counts the model that CONFIG names."""
    if is_file_name(args.config):
        return analyze_lazy_config(args.config, args.overrides, args.input)
    entry = zoo.get(args.config)
    size = padded_size(*args.input, entry.pad_divisor) if args.input else None
    return dataclasses.replace(analyze_backbone(entry.config, size), name=entry.name)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.zoo:
        entries = zoo.entries()
        report = list(tqdm(analyze_zoo(entries), total=len(entries), unit="model", disable=None))
        text = zoo_table(report)
        plain = [dataclasses.asdict(row) for row in report]
    else:
        try:
            report = analyze(args)
        except ValueError as error:  # every configuration error is one
            sys.exit(f"analyze_model: {error}")
        text = model_table(report)
        plain = dataclasses.asdict(report)
    print(json.dumps(plain, indent=2) if args.json else text)


if __name__ == "__main__":
    main()
