#!/usr/bin/env python
"""Draws what happens inside of a PIIP model on an image: attention maps, sampling points, Fourier spectra.

    python tools/visualize.py --model piip_tsb_1120_896_448 --weights piip_tsb.pth --image photo.jpg --output figures
    python tools/visualize.py --config-file projects/PIIP/configs/demo/piip_digits_mask_rcnn.py \\
        --checkpoint output/demo/detector/model_final.pth --image photo.jpg --query 120,80 --output figures

attention.png shows where the query looks in one block of every branch, sampling.png what it reads from the other
branches in one interaction, spectra.png the frequencies in the features of every branch; visualization.json has the
numbers. Branches count from 1 (the largest model), blocks and interactions from 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from piip_core import zoo
from piip_core.checkpoints import load_checkpoint
from piip_core.errors import UserError
from piip_core.images import read_image
from piip_core.pyramid import PIIP

try:
    from piip_core.visualization import Scene, network_input, prepare_scene, visualize
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    sys.exit("visualize: drawing needs matplotlib: pip install matplotlib")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help=f"a published model: {', '.join(zoo.names())}")
    source.add_argument("--config-file", metavar="FILE", help="LazyConfig of a detector (.py or .yaml)")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint for --model; random weights without")
    parser.add_argument("--checkpoint", metavar="FILE", help="checkpoint for --config-file")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--query", type=two_numbers, metavar="X,Y", help="pixel of the image (default: its centre)")
    parser.add_argument(
        "--block",
        type=numbers,
        metavar="N[,N...]",
        help="block whose attention is drawn, one for all branches or one for each (default: the middle ones)",
    )
    parser.add_argument("--interaction", type=int, metavar="N", help="default: the middle one")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the figures")
    parser.add_argument("--device", help="default: cuda if there is one; of a LazyConfig its train.device")
    parser.add_argument("--opts", nargs="*", default=[], metavar="key=value", help="overrides of the LazyConfig")
    args = parser.parse_args(argv)
    if args.config_file and not args.checkpoint:
        parser.error("--config-file needs --checkpoint")
    for option, needs in (("weights", "model"), ("checkpoint", "config_file"), ("opts", "config_file")):
        if getattr(args, option) and not getattr(args, needs):
            parser.error(f"--{option} goes with --{needs.replace('_', '-')} only")
    return args


def numbers(text: str) -> list[int]:
    """Integers between commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers between commas") from None


def two_numbers(text: str) -> tuple[int, int]:
    """Two integers, X,Y."""
    found = numbers(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected X,Y")
    return found[0], found[1]


def from_zoo(args: argparse.Namespace, original: np.ndarray) -> tuple[str, nn.Module, Scene]:
    """Title, model and prepared image for a published model."""
    entry = zoo.get(args.model)
    image, pixel_values = network_input(
        original,
        long_side=entry.image_size,
        short_side=entry.image_size * 800 // 1333,  # COCO's usual shape
        pixel_mean=entry.pixel_mean,
        pixel_std=entry.pixel_std,
        pad_divisor=entry.pad_divisor,
    )
    scene = prepare_scene(original.shape[:2], image, pixel_values, args.query)
    torch.manual_seed(0)
    model = PIIP(entry.config)
    if args.weights:
        load_checkpoint(model, args.weights)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return entry.name + ("" if args.weights else " (random weights)"), model.to(device).eval(), scene


def from_config(args: argparse.Namespace, original: np.ndarray) -> tuple[str, nn.Module, Scene]:
    """Title, model and prepared image for a trained detector."""
    try:
        from detectron2.config import instantiate
        from detectron2.data.transforms import AugInput, AugmentationList

        from piip.lazy_config import load_config
        from piip.predict import Predictor
    except ImportError as error:
        raise UserError(f"--config-file needs Detectron2 ({error}); see README.md") from error
    cfg = load_config(args.config_file, args.opts)
    model = Predictor(cfg, args.checkpoint, device=args.device).model
    mapper = cfg.dataloader.test.mapper
    order = slice(None, None, -1 if mapper.image_format == "BGR" else 1)
    inputs = AugInput(original[:, :, order])
    AugmentationList(instantiate(mapper.augmentations))(inputs)
    tensor = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
    images = model.preprocess_image([{"image": tensor}])
    scene = prepare_scene(original.shape[:2], inputs.image[:, :, order], images.tensor, args.query)
    return Path(args.config_file).stem, model, scene


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        original = read_image(args.image)
        name, model, scene = (from_zoo if args.model else from_config)(args, original)
        options = {"blocks": args.block, "interaction": args.interaction}
        files = visualize(model, scene, args.output, name=name, **options)
    except UserError as error:
        sys.exit(f"visualize: {error}")
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
