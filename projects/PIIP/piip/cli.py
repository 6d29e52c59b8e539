"""The command `piip`: a detector, segmentor or classifier of your own in three commands."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

_TASKS = ("detect", "segment", "semantic", "classify")
_EXAMPLES = """\
piip train --data FOLDER                      finds out what the folder is, trains, keeps the best weights
piip predict photo.jpg --model output/FOLDER  draws what it finds, and writes predictions.json
piip export output/FOLDER model.onnx          writes the detector for other programs
"""
_TILES = "look at tiles of N pixels, too (default: as large as the model sees without resizing), by sahi"


def _batch(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="piip", description=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on a folder of images; repeated, it goes on")
    add = train.add_argument
    add("--data", required=True, metavar="FOLDER", help="COCO, YOLO, Pascal VOC, label maps, or a folder per class")
    add("--model", metavar="NAME", help="of `piip models`; `tiny` trains on a CPU in minutes")
    add("--task", choices=_TASKS, metavar="TASK", help="|".join(_TASKS) + "; default: what the data have")
    add("--output", metavar="DIR", help="folder of the run (default: output/FOLDER)")
    add("--format", metavar="FORM", help="coco|yolo|voc|maps|classes, where FOLDER could be several")
    add("--validation", type=float, default=0.2, metavar="PART", help="held out where FOLDER has no validation part")
    add("--epochs", type=float, metavar="N", help="default: for 5000 iterations, 12 to 100")
    add("--batch", type=_batch, metavar="N|auto", help="images an iteration; auto (default): the recipe's, or fewer")
    add("--image-size", type=int, metavar="N", help="long side images are resized to; the pyramid's sizes follow")
    add("--freeze", choices=("branches", "all-but-heads"), metavar="WHAT", help="branches|all-but-heads: not trained")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank (peft) in place of the branches")
    add("--patience", type=int, metavar="N", help="end after N evaluations without a better score")
    add("--ema", type=float, metavar="DECAY", help="average the weights, with 0.999 say")
    add("--weights", default="released", metavar="W", help="released (default), branches, random, or a checkpoint")
    add("--device", metavar="DEVICE", help="cpu or cuda; default: a GPU if there is one")
    add("--track", default="tensorboard", metavar="WITH", help="tensorboard (default), wandb, mlflow: draws the curves")
    add("--gpus", type=int, default=1, metavar="N", help="processes, one per GPU")
    add("--seed", type=int, default=0, metavar="N", help="of the split and the training")
    add("--set", nargs="+", default=[], metavar="key=value", help="other settings of the LazyConfig")
    train.set_defaults(run=_train)

    predict = commands.add_parser("predict", help="draw what a model finds")
    predict.add_argument("inputs", nargs="+", metavar="PATH", help="image files, folders, video files")
    _add_model(predict, "--model", required=True)
    predict.add_argument("--output", required=True, metavar="DIR", help="folder for images and predictions.json")
    predict.add_argument("--min-score", type=float, default=0.5, metavar="S", help="lowest score shown (default 0.5)")
    predict.add_argument("--image-size", type=int, metavar="N", help="long side images or tiles are resized to")
    look = predict.add_mutually_exclusive_group()
    look.add_argument("--one-pass", action="store_true", help="look at the whole image at once (default)")
    look.add_argument("--tiles", type=int, nargs="?", default=False, const=True, metavar="N", help=_TILES)
    predict.set_defaults(run=_predict)

    evaluate = commands.add_parser("eval", help="score a model, with a report of what it confuses")
    _add_model(evaluate, "model")
    evaluate.add_argument("data", nargs="?", metavar="FOLDER", help="other images than the run's validation part")
    evaluate.add_argument("--format", metavar="FORM", help="as for `piip train`")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="write a detector as ONNX")
    export.add_argument("model", metavar="MODEL", help="as for `piip predict`")
    export.add_argument("file", metavar="FILE.onnx")
    export.add_argument("--image", metavar="PATH", help="with objects, of the size of all; default: a validation image")
    export.add_argument("--no-gridsample", action="store_true", help="gather pixels instead, for TensorRT")
    export.add_argument("--fp16", action="store_true", help="weights and features in half the bits")
    export.add_argument("--int8", action="store_true", help="in a quarter, scaled to training images of the run")
    export.set_defaults(run=_export)

    models = commands.add_parser("models", help="list the models")
    models.add_argument("--task", choices=_TASKS)
    models.set_defaults(run=_models)
    return parser


def _add_model(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    parser.add_argument(
        name, metavar="MODEL", help="folder of a run, a checkpoint in it, or a released model", **options
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: a GPU if there is one")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake ends it with one line."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last checkpoint.")


# What follows loads PyTorch and Detectron2: not for --help


def _run(args: argparse.Namespace) -> None:
    from piip_core.errors import UserError

    if importlib.util.find_spec("detectron2") is None:
        sys.exit("error: piip needs Detectron2; docs/install.md says how to install it")
    warnings.simplefilter("ignore")  # deprecations inside of libraries, which nobody here can mend
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)  # the same, said otherwise
    try:
        args.run(args)
    except UserError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:  # folders that cannot be made, files in their place
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")


def _train(args: argparse.Namespace) -> None:
    from piip.compose import TrainOptions
    from piip.detector import Detector

    options = {field.name: getattr(args, field.name) for field in fields(TrainOptions) if hasattr(args, field.name)}
    options |= {"form": args.format, "validation": args.validation, "overrides": tuple(args.set)}
    best = Detector(args.model).train(args.data, output=args.output, **options)
    if best:
        print(f"best {best['metric']} {best['value']:.1f}, after {best['iteration']} iterations")


def _predict(args: argparse.Namespace) -> None:
    from piip.demo import run_demo
    from piip.detector import Detector
    from piip_core.errors import check

    check(0 <= args.min_score <= 1, "--min-score", args.min_score, "0 to 1")
    detector = Detector(args.model, device=args.device, image_size=args.image_size)
    options = {"min_score": args.min_score, "tiles": detector.tile_size(args.tiles)}
    errors = run_demo(detector.predictor, args.inputs, args.output, **options)
    print(f"results are in {args.output}")
    if errors:
        sys.exit("\n".join(f"error: {message}" for message in errors))


def _evaluate(args: argparse.Namespace) -> None:
    from piip.detector import Detector

    for task, scores in Detector(args.model, device=args.device).evaluate(args.data, form=args.format).items():
        print(task, *(f"{name} {value:.1f}" for name, value in scores.items() if "-" not in name))


def _export(args: argparse.Namespace) -> None:
    from piip.detector import Detector

    options = {"gridsample": not args.no_gridsample, "fp16": args.fp16, "int8": args.int8}
    print(Detector(args.model).export(args.file, args.image, **options))


def _models(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from piip.compose import TINY, models

    rows = []
    for model in models():
        if args.task is None or args.task in model.tasks:
            rows.append((model.name, "/".join(model.tasks), *_facts(model.entry)))
    print(tabulate(rows, ("name", "task", "image sizes", "GFLOPs", "published score"), disable_numparse=True))
    print(f"Scores are those of COCO, ADE20K and ImageNet. {TINY} is the demo's: for a CPU, from random weights.")


def _facts(entry: Any) -> tuple[str, str, str]:
    if entry is None:
        return "192/144/96", "", ""
    numbers = entry.published
    names = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU", "top1": "top-1"}
    scores = [f"{name} {getattr(numbers, key)}" for key, name in names.items() if getattr(numbers, key, None)]
    return entry.resolution, f"{numbers.flops_g:g}" if numbers.flops_g else "", ", ".join(scores)
