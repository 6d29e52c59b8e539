#!/usr/bin/env python
"""Draws what a trained detector, segmentor or classifier finds on images, folders of images and videos.

    python tools/demo.py --config-file CONFIG.py --checkpoint output/run/model_final.pth \\
        --input photo.jpg folder/ clip.mp4 --output output/pictures

Pictures (videos as .mp4) and predictions.json appear in the output folder: detections in COCO's result format; the
classes of a segmentation, with a label map beside every picture; or the five best classes of every image, as bars and
with scores. --checkpoint takes checkpoints of own trainings, published ones that tools/convert_checkpoint.py has
converted, and names of released models (python -m piip_core.zoo lists them), which are fetched.
Runs on the GPU if there is one, else on the CPU; train.device decides.
"""

import argparse
import logging
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="LazyConfig (.py or .yaml)")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help=".pth, .safetensors or a released model: python -m piip_core.zoo",
    )
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="image files, folders, video files")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="lowest score of a detection shown (default 0.5)"
    )
    parser.add_argument(
        "--class-names",
        metavar="A,B,C",
        help="in the order of the model's classes, if the checkpoint does not have them",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="fold weights for speed first; results differ by rounding alone"
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="key=value", help="overrides of the configuration")
    args = parser.parse_args()
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold {args.confidence_threshold}: expected 0 to 1")
    # Loads torch and Detectron2: not for --help
    from piip.demo import run_demo
    from piip.lazy_config import load_config
    from piip.predict import Predictor
    from piip_core.errors import UserError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        cfg = load_config(args.config_file, args.opts)
        names = args.class_names.split(",") if args.class_names else None
        predictor = Predictor(cfg, args.checkpoint, class_names=names, prepare=args.prepare)
        errors = run_demo(predictor, args.input, args.output, min_score=args.confidence_threshold)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"Results are in {args.output}")
    if errors:
        sys.exit("\n".join(f"error: {message}" for message in errors))


if __name__ == "__main__":
    main()
