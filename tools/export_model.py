#!/usr/bin/env python
"""Exports a classifier, a detector, or the backbone of a detector or segmentor to ONNX or as a torch.export program.

What the file computes is compared with PyTorch.

Examples:
    python tools/export_model.py piip_tsb_368_192_128 --checkpoint model.safetensors --output piip.onnx
    python tools/export_model.py piip_tsb_1120_896_448 --image-size 800 1120 --output backbone.onnx
    python tools/export_model.py projects/PIIP/configs/COCO/mask_rcnn_piip_tsb_1120_896_448_1x.py \\
        --checkpoint output/run/model_final.pth --output backbone.pt2
    python tools/export_model.py projects/PIIP/configs/COCO/mask_rcnn_piip_tsb_1120_896_448_1x.py \\
        --checkpoint output/run/model_final.pth --whole photo.jpg --output detector.onnx

The file needs nothing of this project: the deformable attention is replaced by standard operators (GridSample, or with
--no-gridsample Gather, for TensorRT). Its input "image" is (batch, 3, H, W), RGB, float32, with the mean taken off and
divided by the deviation that the tool prints. Outputs are "logits" (before the softmax) of a classifier, maps
"stride4", "stride8" ... of a backbone. A whole detector takes resized images (batch, 3, H, W) of 0 to 255 and gives of
all objects "batch_index", "boxes" in pixels, "scores", "classes" and "masks" in boxes. It is traced with the image that
--whole names, which must have objects, and is for images of that size.

ONNX needs the packages onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from piip_core import ClassifierConfig, DensePIIP, PIIPClassifier, PIIPConfig, zoo
from piip_core.checkpoints import build_trained
from piip_core.classifier import build_model
from piip_core.errors import UserError
from piip_core.export import DEFAULT_OPSET, ExportCheck, export_onnx, save_program
from piip_core.meta import on_meta
from piip_core.zoo.entry import IMAGENET_MEAN, IMAGENET_STD


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a published classifier or backbone by name, or a LazyConfig file")
    parser.add_argument("overrides", nargs="*", help="of a LazyConfig, as key=value")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .onnx or .pt2 (torch.export)")
    parser.add_argument("--checkpoint", type=Path, help="weights; without, they are random")
    parser.add_argument("--ema", action="store_true", help="of a classifier's checkpoint, take the moving average")
    parser.add_argument(
        "--image-size", nargs="+", type=int, metavar="N", help="side, or height and width; they are fixed"
    )
    parser.add_argument(
        "--whole", type=Path, metavar="IMAGE", help="the whole detector, for images of the size of this"
    )
    parser.add_argument("--batch-size", type=int, help="fixed number of images; without, it is open")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="of ONNX (default: %(default)s)")
    parser.add_argument("--no-gridsample", action="store_true", help="ONNX without that operator")
    args = parser.parse_intermixed_args(argv)
    if args.output.suffix not in (".onnx", ".pt2"):
        parser.error(f"--output {args.output}: expected a name ending in .onnx or .pt2")
    if args.image_size and (len(args.image_size) > 2 or min(args.image_size) < 1):
        parser.error(f"--image-size {args.image_size}: expected one or two positive numbers of pixels")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected a positive number")
    if args.whole and (args.output.suffix != ".onnx" or Path(args.config).suffix != ".py" or not args.checkpoint):
        parser.error("--whole: expected a LazyConfig, --checkpoint and an .onnx file")
    if args.whole and (args.batch_size or args.image_size or args.ema):
        parser.error("--whole: expected no --batch-size, --image-size or --ema: the size is the image's")
    if args.no_gridsample and args.output.suffix != ".onnx":
        parser.error("--no-gridsample: expected an .onnx file")
    if args.ema and args.checkpoint is None:
        parser.error("--ema: expected --checkpoint, too")
    return args


Described = tuple[list[PIIPConfig | ClassifierConfig], Sequence[float], Sequence[float]]
"""What a model may be (as published, or as newly trained), and mean and deviation of its pixels."""


def from_zoo(name: str) -> Described:
    """The published model of that name."""
    entry = zoo.find(name)
    if isinstance(entry, zoo.ClassificationEntry):
        return [entry.config, entry.training_config], IMAGENET_MEAN, IMAGENET_STD
    return [entry.config], entry.pixel_mean, entry.pixel_std


def check_detectron2(path: str) -> None:
    """Raises a UserError if there is none."""
    try:
        import piip.lazy_config  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path} is a LazyConfig, which needs Detectron2 ({error}); see README.md") from None


def from_lazy_config(path: str, overrides: Sequence[str]) -> Described:
    """The classifier or backbone of a LazyConfig."""
    check_detectron2(path)
    from detectron2.config import instantiate

    from piip.lazy_config import load_config, skip_pretrained

    config = load_config(path, overrides)
    skip_pretrained(config)
    with on_meta():
        model: nn.Module = instantiate(config.model)
    for module in model.modules():
        if isinstance(module, PIIPClassifier | DensePIIP):
            found = module.config if isinstance(module, PIIPClassifier) else module.pyramid.config
            return [found], list(config.model.pixel_mean), list(config.model.pixel_std)
    raise UserError(f"{path}: there is no PIIP backbone or classifier in it")


def build(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, int], dict[str, str]]:
    """The model, the size of its images, and what to note beside it."""
    lazy = Path(args.config).suffix == ".py"
    if args.overrides and not lazy:
        raise UserError(f"overrides {args.overrides} go with a LazyConfig file only")
    configs, mean, std = from_lazy_config(args.config, args.overrides) if lazy else from_zoo(args.config)
    if args.checkpoint is None:
        print("without --checkpoint: the weights are random", file=sys.stderr)
        model = build_model(configs[0])
    else:
        model = build_trained(configs, args.checkpoint, ema=args.ema)
    side = configs[0].image_size
    height, width = (args.image_size * 2)[:2] if args.image_size else (side, side)
    return model, (height, width), {"model": args.config, "pixel_mean": str(list(mean)), "pixel_std": str(list(std))}


def export_part(args: argparse.Namespace) -> ExportCheck:
    """Writes the classifier or backbone."""
    model, image_size, notes = build(args)
    print(f"images: {image_size[0]} x {image_size[1]}, mean {notes['pixel_mean']}, deviation {notes['pixel_std']}")
    if args.output.suffix == ".pt2":
        return save_program(model, args.output, image_size, batch_size=args.batch_size)
    options = {"batch_size": args.batch_size, "opset": args.opset, "metadata": notes}
    options["gridsample"] = not args.no_gridsample
    return export_onnx(model, args.output, image_size, **options)


def export_whole(args: argparse.Namespace) -> ExportCheck:
    """Writes the detector of a LazyConfig."""
    check_detectron2(args.config)
    from piip.data import read_image
    from piip.export import export_detector
    from piip.lazy_config import load_config
    from piip.predict import Predictor

    config = load_config(args.config, args.overrides)
    predictor = Predictor(config, str(args.checkpoint), device="cpu")
    image = predictor.to_input(read_image(str(args.whole)))
    print(f"images: {image.shape[1]} x {image.shape[2]}, {config.model.get('input_format')}, 0 to 255")
    names = [category.name for category in predictor.categories]
    options = {"opset": args.opset, "gridsample": not args.no_gridsample, "names": names}
    return export_detector(predictor.model, args.output, image, **options)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("piip_core").setLevel(logging.INFO)
    try:
        check = export_whole(args) if args.whole else export_part(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(check)
    return 0


if __name__ == "__main__":
    sys.exit(main())
