"""From nothing to images of a trained PIIP detector, on real images and without a download.

    python -m piip.digit_demo               # goes on where an earlier call stopped; a finished run is only drawn again
    python -m piip.digit_demo --restart     # trains from the beginning

Draws the data set of digits on photographs, trains a small three-branch PIIP Mask R-CNN on the CPU with
tools/lazyconfig_train_net.py, evaluates it and draws what it finds. Without Detectron2 the same digits train a PIIP
classifier instead.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from piip.charts import read_metrics
from piip_core.errors import UserError
from piip_digits.data_sets import prepare_digits

from .classifier import run_classifier
from .drawing import draw_predictions

_ROOT = Path(__file__).resolve().parents[4]
_TRAIN = _ROOT / "tools" / "lazyconfig_train_net.py"
_CONFIG = _ROOT / "projects" / "PIIP" / "configs" / "demo" / "piip_digits_mask_rcnn.py"


def main(arguments: list[str] | None = None) -> None:
    """Runs the demo; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m piip.digit_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=_ROOT / "output" / "demo", help="folder of everything written")
    parser.add_argument("--data", type=Path, default=_ROOT / "datasets" / "digits", help="folder of the data set")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run instead of going on with it")
    parser.add_argument("--classifier", action="store_true", help="train the classifier even with Detectron2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the detector's configuration")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # deprecations inside Detectron2 and PyTorch, which no user of the demo can mend
    missing = importlib.util.find_spec("detectron2") is None
    try:
        if args.classifier or missing:
            _classifier(args)
        else:
            _detector(args)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last checkpoint.")
    except UserError as error:
        sys.exit(f"error: {error}")
    if missing and not args.classifier:
        print("Left out: the Mask R-CNN detector, because Detectron2 is not installed (docs/install.md says how).")


def _detector(args: argparse.Namespace) -> None:
    """Data set, training with evaluation, images."""
    start = time.monotonic()
    output = args.output / "detector"
    print(f"== Data set: {args.data}: {'written' if prepare_digits(args.data) else 'already there'}", flush=True)
    if args.restart:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    print(f"== Training a three-branch PIIP Mask R-CNN: everything it writes is in {output}", flush=True)
    # On small images two processes with one thread each are much faster than one process with two threads.
    cores = len(os.sched_getaffinity(0))
    processes = min(cores, 2)
    environment = {
        "OMP_NUM_THREADS": str(max(cores // processes, 1)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
    }
    command = [sys.executable, str(_TRAIN), "--config-file", str(_CONFIG), "--num-gpus", str(processes), "--resume"]
    values = {"train.output_dir": output}
    for split, name in (("train", "train"), ("test", "val")):
        values[f"data.{split}.annotations"] = args.data / "annotations" / f"instances_{name}.json"
        values[f"data.{split}.images"] = args.data / name
    # Quoted for the parser of overrides: paths may hold spaces and brackets.
    overrides = ["train.report=true", *(f'{key}="{Path(path).resolve()}"' for key, path in values.items())]
    command += [*overrides, *args.overrides]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, errors="replace") as training:
        for line in training.stdout:
            if "iter: " in line or "copypaste: " in line:  # the rest is in the log; errors go to the other stream
                print(line, end="", flush=True)
    if training.returncode:
        raise UserError(f"training stopped with exit status {training.returncode}, see above and {output / 'log.txt'}")
    _draw_detector(args, output, time.monotonic() - start)


def _draw_detector(args: argparse.Namespace, output: Path, seconds: float) -> None:
    """Draws predictions of a finished run and prints its numbers."""
    curves = read_metrics(output / "metrics.json")
    if "segm/AP" not in curves:
        raise UserError(f"{output / 'metrics.json'} holds no evaluation: expected one with bbox/AP and segm/AP")
    box, mask, box50, mask50 = (curves[key][1][-1] for key in ("bbox/AP", "segm/AP", "bbox/AP50", "segm/AP50"))
    drawing = args.output / "predictions.png"
    title = f"PIIP Mask R-CNN on digits and photographs never seen in training: box AP {box:.1f}, mask AP {mask:.1f}"
    annotations, results = "annotations/instances_val.json", output / "inference" / "coco_instances_results.json"
    draw_predictions(drawing, title, args.data / annotations, args.data / "val", results)
    print(f"== Done in {seconds / 60:.1f} minutes: to open:", drawing, output / "report.html", sep="\n  ")
    print(f"box AP {box:.1f} (AP50 {box50:.1f}), mask AP {mask:.1f} (AP50 {mask50:.1f}) on the validation scenes")


def _classifier(args: argparse.Namespace) -> None:
    """The classifier; a start for detectors and segmentors."""
    output = args.output / "classifier"
    if args.restart:
        shutil.rmtree(output, ignore_errors=True)
    torch.set_num_threads(1)  # the tensors are small: a second thread brings little and waits a lot on a busy machine
    run_classifier(output)
    print(f"== Done: its backbone is {output / 'backbone.safetensors'}")


if __name__ == "__main__":
    main()
