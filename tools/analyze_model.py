"""Counts parameters and FLOPs of a PIIP model per module, or the memory that training it takes.

Nothing is computed or stored for it.

Examples:
    python tools/analyze_model.py piip_tsb_1568_1120_672
    python tools/analyze_model.py piip_tsb_1568_1120_672 --input 800 1333 --json
    python tools/analyze_model.py projects/PIIP/configs/COCO/mask_rcnn_vit_b_1024_1x.py model.roi_heads.num_classes=10
    python tools/analyze_model.py projects/PIIP/configs/COCO/mask_rcnn_piip_h6b_1024_512_1x_ms.py --memory \\
        --gpus 8 --gpu-memory 80 --batch-size 2

Units: parameters are absolute numbers in --json and millions in tables; FLOPs are multiply-accumulates (MACs), absolute
in --json and GMACs in tables. "Published count" is the rule behind the published #Param and #FLOPs (square
image, without merging convolutions and feature pyramid); the other columns are what the model holds and executes on one
image of the --input size after padding.

--memory prints GiB per GPU for every ZeRO stage (0: DistributedDataParallel) without, with cheap and with full
activation checkpointing, and whether that fits; --kept also what is kept for the backward pass, by module. A LazyConfig
counts the whole detector or segmentor; a published model's name the backbone alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from piip_core import PIIPClassifier, zoo
from piip_core.classifier import build_model
from piip_core.deepspeed_start import BUCKET_SIZE
from piip_core.meta import on_meta
from piip_tools.flops.executed import ModelReport, analyze_backbone, analyze_model, padded_size
from piip_tools.flops.tables import model_table
from piip_tools.memory.dry_run import DryRun, backbone_step
from piip_tools.memory.estimate import MemoryReport, Setting, estimate_memory, kept_table, memory_table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*zoo.names(), *(entry.name for entry in zoo.classification_entries())]
    parser.add_argument(
        "config",
        help=f"a LazyConfig file, or a published model (released ones also as mask_rcnn_...): {', '.join(names)}",
    )
    parser.add_argument("overrides", nargs="*", help="of a LazyConfig, as key=value")
    parser.add_argument(
        "--input",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="image size before padding (default: a square of the largest branch's size; of a LazyConfig with --memory "
        "the training size)",
    )
    parser.add_argument("--memory", action="store_true", help="the memory that training takes on each GPU")
    memory = parser.add_argument_group("with --memory")
    memory.add_argument("--kept", action="store_true", help="also what is kept for the backward pass, by module")
    memory.add_argument("--gpus", type=int, default=8, help="over all machines (default: %(default)s)")
    memory.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="of each GPU (default: %(default)s)")
    memory.add_argument("--batch-size", type=int, default=2, help="images per GPU (default: %(default)s)")
    memory.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast (default)")
    memory.add_argument(
        "--offload", choices=("none", "optimizer", "parameters"), default="none", help="what the host keeps under ZeRO"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with absolute numbers")
    args = parser.parse_intermixed_args(argv)  # options may follow the overrides
    if args.overrides and not is_file_name(args.config):
        parser.error(f"overrides {args.overrides} go with a LazyConfig file only")
    if args.input and min(args.input) < 1:
        parser.error(f"--input {args.input[0]} {args.input[1]}: expected two positive numbers of pixels")
    return args


def is_file_name(config: str) -> bool:
    """Whether CONFIG is a LazyConfig file and not the name of a published model."""
    return Path(config).suffix in (".py", ".yaml", ".yml")


def load_lazy_model(path: str, overrides: list[str]) -> tuple[Any, nn.Module]:
    """The configuration without the weights of the branches, and its model on the meta device."""
    try:
        from detectron2.config import instantiate

        from piip.lazy_config import load_config, skip_pretrained
    except ImportError as error:
        sys.exit(f"analyze_model: {path} is a LazyConfig, which needs Detectron2 ({error}); see README.md")
    config = load_config(path, overrides)
    skip_pretrained(config)
    with on_meta():
        return config, instantiate(config.model)


def analyze(args: argparse.Namespace) -> ModelReport:
    """Counts the model that CONFIG names."""
    if not is_file_name(args.config):
        entry = zoo.find(args.config)
        size = args.input and padded_size(*args.input, entry.pad_divisor)
        return dataclasses.replace(analyze_backbone(entry.config, size), name=entry.name)
    _, model = load_lazy_model(args.config, args.overrides)
    if isinstance(model, PIIPClassifier):
        return dataclasses.replace(analyze_backbone(model.config, args.input), name=type(model).__name__)
    size = args.input and padded_size(*args.input, model.backbone.size_divisibility)
    return analyze_model(model, size, backbone="backbone")


def analyze_memory(args: argparse.Namespace) -> MemoryReport:
    """Memory of training the model that CONFIG names."""
    given = {name: getattr(args, name) for name in ("gpus", "gpu_memory", "precision", "offload", "batch_size")}
    if not is_file_name(args.config):
        entry = zoo.find(args.config)
        size = padded_size(*(args.input or [entry.image_size] * 2), entry.pad_divisor)
        with on_meta():
            model = build_model(entry.config)
        whole = isinstance(model, PIIPClassifier)
        notes = [] if whole else [f"The backbone alone: {entry.config_file} counts the heads too"]
        step, setting = backbone_step(args.batch_size, size), Setting(input_size=size, **given)
        return estimate_memory(entry.name, DryRun(model), step, setting, notes)
    config, model = load_lazy_model(args.config, args.overrides)
    from omegaconf import OmegaConf

    from piip.lazy_config import training_size
    from piip_tools.memory.training_steps import size_divisor, training_step

    size = padded_size(*(args.input or training_size(config)), size_divisor(model))
    bucket_size = OmegaConf.select(config, "train.deepspeed.bucket_size", default=BUCKET_SIZE)
    setting = Setting(input_size=size, bucket_size=bucket_size, **given)
    step, notes = training_step(model, args.batch_size, size)
    return estimate_memory(Path(args.config).stem, DryRun(model), step, setting, notes)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        report = analyze_memory(args) if args.memory else analyze(args)
    except ValueError as error:  # every configuration error is one
        sys.exit(f"analyze_model: {error}")
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(memory_table(report) if args.memory else model_table(report))
        if args.memory and args.kept:
            print(f"\n{kept_table(report)}")


if __name__ == "__main__":
    main()
