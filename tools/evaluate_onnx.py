#!/usr/bin/env python
"""Scores ONNX files of detectors on a data set in COCO's form: AP, size, time, and how far boxes move from the first.

Example: python tools/evaluate_onnx.py ANNOTATIONS.json IMAGES detector.onnx detector_int8.onnx
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from run_onnx import detect
from tabulate import tabulate

Result = dict[str, Any]


def find_all(file: str, coco: COCO, images: Path) -> tuple[list[Result], float]:
    """Detections in COCO's form, and the median time of an image in ms, without reading it."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    categories, results, seconds = sorted(coco.getCatIds()), [], []
    for record in coco.dataset["images"]:
        image = Image.open(images / record["file_name"]).convert("RGB")
        start = time.perf_counter()
        (found,) = detect(session, [image], min_score=0)
        seconds.append(time.perf_counter() - start)
        boxes, scores, classes, masks = found
        for index, (box, score, kind) in enumerate(zip(boxes, scores, classes, strict=True)):
            result = {"image_id": record["id"], "category_id": categories[kind], "score": float(score)}
            result["bbox"] = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            if masks:
                result["segmentation"] = rle.encode(np.asfortranarray(masks[index], dtype=np.uint8))
            results.append(result)
    return results, float(np.median(seconds)) * 1000


def average_precision(coco: COCO, results: list[Result], kind: str) -> float:
    """COCO's AP in percent, of "bbox" or "segm"."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def movement(reference: Sequence[Result], results: Sequence[Result]) -> str:
    """Median and 95th percentile of the largest move of a corner, in pixels, and how many objects are lost.

    Of objects with a score of 0.5 in the reference; those count as lost that no box of the class overlaps by half.
    """
    moves, lost = [], 0
    for one in (result for result in reference if result["score"] >= 0.5):
        key = one["image_id"], one["category_id"]
        boxes = np.array([r["bbox"] for r in results if (r["image_id"], r["category_id"]) == key]).reshape(-1, 4)
        overlaps = rle.iou(boxes, np.array([one["bbox"]]), [0]) if len(boxes) else np.zeros((1, 1))
        if overlaps.max() < 0.5:
            lost += 1
            continue
        pair = np.array([boxes[overlaps.argmax()], one["bbox"]])
        pair[:, 2:] += pair[:, :2]
        moves.append(np.abs(pair[0] - pair[1]).max())
    return "{:.2g} / {:.2g}, {} lost".format(*np.percentile(moves, (50, 95)), lost) if moves else f"{lost} lost"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations")
    parser.add_argument("images", type=Path, help="their folder")
    parser.add_argument("files", nargs="+", metavar="FILE.onnx")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(args.annotations)
    rows, reference = [], None
    for file in args.files:
        results, milliseconds = find_all(file, coco, args.images)
        reference = reference or results
        kinds = ["bbox", "segm"] if results and "segmentation" in results[0] else ["bbox"]
        scores = [f"{average_precision(coco, results, kind):.1f}" for kind in kinds] if results else ["0"]
        size = Path(file).stat().st_size / 1e6
        moved = movement(reference, results)
        rows.append((Path(file).name, " / ".join(scores), f"{size:.1f}", f"{milliseconds:.0f}", moved))
    head = ("file", "box / mask AP", "MB", "ms per image", "boxes moved, px: median / 95 %")
    print(tabulate(rows, head, disable_numparse=True, tablefmt="github"))


if __name__ == "__main__":
    main()
