#!/usr/bin/env python
"""Draws what a detector finds that `piip export` wrote; needs onnxruntime, numpy and pillow alone.

python tools/run_onnx.py detector.onnx FOLDER photo.jpg ...  writes FOLDER/photo.png ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def detect(session, images, min_score=0.5):
    """Boxes (N, 4), scores, classes and masks (N times (H, W), or none) of each of pillow's RGB images."""
    channels, mean = (json.loads(session.get_modelmeta().custom_metadata_map[key]) for key in ("format", "pixel_mean"))
    frame = np.array(session.get_inputs()[0].shape[:1:-1])  # width and height
    batch = np.ones((len(images), *frame[::-1], 3), np.float32) * mean  # which becomes 0 in the model
    sizes = [(min(frame / image.size) * np.array(image.size) + 0.5).astype(int) for image in images]
    for filled, image, size in zip(batch, images, sizes, strict=True):
        bands = [stretch(band.convert("F"), np.array([0, 0, *size]), size) for band in image.split()]
        filled[: size[1], : size[0]] = np.floor(np.dstack(bands if channels == "RGB" else bands[::-1]) + 0.5)
    index, *found = session.run(None, {"image": batch.transpose(0, 3, 1, 2).astype(np.float32)})
    for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
        boxes, *others = (part[(index == number) & (found[1] >= min_score)] for part in found)
        boxes = np.minimum(boxes, np.tile(size, 2)) * np.tile(image.size / size, 2)
        masks = [paste(*both, image.size) for both in zip(*others[2:], boxes, strict=True)] if others[2:] else []
        yield boxes, *others[:2], masks


def stretch(image, box, size):
    """Pixels of an image (width, height) = `size` where the given one fills the box: linear, without smoothing."""
    scale = np.array(image.size) / (box[2:] - box[:2])
    matrix = (scale[0], 0, -box[0] * scale[0], 0, scale[1], -box[1] * scale[1])
    return np.asarray(image.transform(tuple(size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def paste(mask, box, size):
    """Where in an image a mask of probabilities in a box, and of zeros around, is at least 0.5."""
    edge = (box[2:] - box[:2]) / len(mask)
    return stretch(Image.fromarray(np.pad(mask, 1)), box + [*-edge, *edge], size) >= 0.5


if __name__ == "__main__":
    _, model, output, *paths = sys.argv
    Path(output).mkdir(parents=True, exist_ok=True)
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    names = json.loads(session.get_modelmeta().custom_metadata_map["names"])
    for path in paths:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        for box, score, index in zip(*next(detect(session, [image]))[:3], strict=True):
            print(f"{path}: {names[index]} {score:.2f} at {box.tolist()}")
            ImageDraw.Draw(image).rectangle(box.tolist(), outline="red")
            ImageDraw.Draw(image).text(box[:2].tolist(), names[index], "yellow")
        image.save(Path(output, Path(path).stem + ".png"))
