"""Predictions drawn on image files, folders and videos: the logic behind `tools/demo.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tqdm import tqdm

from piip.bars import draw_bars
from piip.data import Category, read_image
from piip.predict import Predictor
from piip_core.errors import UserError
from piip_core.files import explain_write_errors, write_atomically
from piip_core.images import image_endings, image_formats

__all__ = ["InputError", "collect_inputs", "draw_detections", "run_demo"]


class InputError(UserError):
    """An input of the demo that is missing or neither image, folder nor video; the message names it."""


@dataclass(frozen=True)
class _Job:
    """One input file and, without suffix, the output it becomes."""

    source: Path
    target: Path
    is_video: bool


def run_demo(predictor: Predictor, inputs: Sequence[str], output: str, *, min_score: float = 0.5) -> list[str]:
    """Writes an image or video with the predictions for every input, and `predictions.json` with all of them.

    For a detector, the JSON is a list in COCO's result format; "file_name" and "category_name" are added, and image ids
    count the images (for videos, the frames) from 1. For a segmentor, each image has a label map beside it,
    `NAME_labels.png`, with the values that the data set's label maps have, and the JSON lists the share of every class
    that was found. For a classifier, the five best classes are drawn as bars beside the image, and the JSON lists them
    with their scores, best first.

    Args:
        predictor: The detector, segmentor or classifier.
        inputs: Image files, folders (all images in and below them) and video files.
        output: Folder for the results; a folder's structure is kept in it.
        min_score: Detections with lower scores are left out; nothing to the others.

    Returns:
        One message per file that could not be read; the others are done all the same.

    Raises:
        InputError: If an input is missing or nothing that can be shown, or a folder has no image.
    """
    jobs = collect_inputs(inputs, output)
    with explain_write_errors(output):
        os.makedirs(output, exist_ok=True)
    results: list[dict[str, Any]] = []
    errors: list[str] = []
    image_id = 0
    for job in tqdm(jobs, desc="inputs", unit="file", disable=len(jobs) == 1 and jobs[0].is_video):
        job.target.parent.mkdir(parents=True, exist_ok=True)
        if job.is_video:
            found, image_id = _run_on_video(predictor, job, image_id, min_score)
            results += found
            continue
        try:
            image = read_image(str(job.source))
        except UserError as error:
            errors.append(str(error))
            continue
        image_id += 1
        target = job.target.with_name(f"{job.target.name}_labels.png")
        drawn, found = _predict(predictor, image, image_id, target, min_score, draw_detections)
        results += _named(found, str(job.source))
        with write_atomically(str(job.target.with_name(job.target.name + ".jpg"))) as file:
            Image.fromarray(drawn).save(file, format="JPEG", quality=92)
    with write_atomically(os.path.join(output, "predictions.json"), "w") as file:
        json.dump(results, file)
    return errors


def draw_detections(image: np.ndarray, instances: Instances, predictor: Predictor) -> np.ndarray:
    """The image (H, W, 3), uint8 RGB, with boxes, masks, class names and scores drawn on it."""
    return Visualizer(image, predictor.metadata).draw_instance_predictions(instances).get_image()


def _predict(
    predictor: Predictor,
    image: np.ndarray,
    image_id: int,
    label_map: Path,
    min_score: float,
    draw: Callable[[np.ndarray, Instances, Predictor], np.ndarray],
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The image with what the model makes of it, and the entries of the JSON; `draw` is for detections alone."""
    if predictor.task == "detection":
        instances = predictor(image, min_score=min_score)
        return draw(image, instances, predictor), predictor.to_coco(instances, image_id)
    if predictor.task == "classification":
        classes = [(predictor.category(index), score) for index, score in predictor.classify(image)]
        drawn = draw_bars(image, [(category.name, score) for category, score in classes])
        return drawn, [_entry(image_id, category, score=score) for category, score in classes]
    labels = predictor.segment(image)
    classes, counts = np.unique(labels, return_counts=True)
    categories = [predictor.category(int(index)) for index in classes]
    values = np.zeros(int(classes.max()) + 1, dtype=np.uint8)
    values[classes] = [category.id for category in categories]
    with write_atomically(str(label_map)) as file:
        Image.fromarray(values[labels]).save(file, format="PNG")
    shares = (counts / labels.size).tolist()
    found = [_entry(image_id, category, share=share) for category, share in zip(categories, shares, strict=True)]
    return Visualizer(image, predictor.metadata).draw_sem_seg(labels, alpha=0.5).get_image(), found


def _entry(image_id: int, category: Category, **found: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category.id, "category_name": category.name, **found}


def collect_inputs(inputs: Sequence[str], output: str) -> list[_Job]:
    """Image and video files named by `inputs`, each with the output file it becomes.

    Raises:
        InputError: If an input is missing or neither image, folder nor video, a folder has no image, or a result would
            replace an input.
    """
    sources: list[tuple[Path, Path]] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in image_endings() and p.is_file())
            if not files:
                raise InputError(f"{text}: no image file in this folder or below it")
            sources += [(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            sources.append((path, Path(path.name)))
        else:
            raise InputError(f"{text}: no such file or folder (looked from {os.getcwd()})")
    jobs, taken = [], set()
    for source, relative in sources:
        # a.jpg becomes a, and a second one of that name a.png
        target = Path(output) / relative.with_suffix("")
        number = 1
        while target in taken:
            number += 1
            target = Path(output) / relative.with_name(f"{relative.stem}_{number}")
        taken.add(target)
        jobs.append(_Job(source, target, _is_video(source)))
    written = {os.path.realpath(f"{job.target}{ending}") for job in jobs for ending in (".jpg", ".mp4", "_labels.png")}
    if lost := [str(job.source) for job in jobs if os.path.realpath(job.source) in written]:
        raise InputError(f"--output {output}: results would replace {lost[0]}: name another folder")
    return jobs


def _is_video(path: Path) -> bool:
    """Whether a file is a video, decided by its content: what Pillow knows is an image, however badly it decodes."""
    try:
        with Image.open(path, formats=image_formats()):
            return False
    except Exception:  # Pillow has no common error for "not an image"
        if path.suffix.lower() in image_endings():
            return False  # a broken image; reading it will say so
    try:
        with av.open(str(path)) as container:
            if container.streams.video:
                return True
    except av.FFmpegError:
        pass
    raise InputError(f"{path}: neither an image nor a video that can be decoded")


def _run_on_video(predictor: Predictor, job: _Job, image_id: int, min_score: float) -> tuple[list[dict[str, Any]], int]:
    """Draws every frame; returns what was found and the last image id."""
    results: list[dict[str, Any]] = []
    visualizer = VideoVisualizer(predictor.metadata)  # keeps an object's colour from frame to frame

    def draw(image: np.ndarray, instances: Instances, _: Predictor) -> np.ndarray:
        return visualizer.draw_instance_predictions(image, instances).get_image()

    encoder = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    target, written = str(job.target.with_name(job.target.name + ".mp4")), None
    with av.open(str(job.source)) as container, av.open(target, "w") as output:
        stream = container.streams.video[0]
        for frame in tqdm(container.decode(stream), total=stream.frames or None, desc=job.source.name, unit="frame"):
            image = frame.to_ndarray(format="rgb24")
            image_id += 1
            label_map = job.target.with_name(f"{job.target.name}_{image_id:06d}_labels.png")
            drawn, found = _predict(predictor, image, image_id, label_map, min_score, draw)
            results += _named(found, str(job.source))
            # The pixel format wants even sides
            drawn = np.ascontiguousarray(drawn[: drawn.shape[0] // 2 * 2, : drawn.shape[1] // 2 * 2])
            if written is None:
                written = output.add_stream(encoder, rate=stream.average_rate or Fraction(25))
                written.height, written.width, written.pix_fmt = *drawn.shape[:2], "yuv420p"
            output.mux(written.encode(av.VideoFrame.from_ndarray(drawn, format="rgb24")))
        if written is not None:
            output.mux(written.encode())
    return results, image_id


def _named(results: list[dict[str, Any]], file_name: str) -> Iterator[dict[str, Any]]:
    return ({**result, "file_name": file_name} for result in results)
