"""Predictions drawn on image files, folders and videos: the logic behind `tools/demo.py`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tqdm import tqdm

from piip.bars import draw_bars
from piip.data import read_image
from piip.predict import Predictor
from piip_core.errors import UserError
from piip_core.files import write_atomically
from piip_core.images import image_endings, image_formats

__all__ = ["InputError", "collect_inputs", "draw_classes", "draw_detections", "draw_segmentation", "run_demo"]

logger = logging.getLogger(__name__)

_ENCODERS = ("libx264", "mpeg4")  # in order of preference; which ones exist depends on how PyAV was built


class InputError(UserError):
    """An input of the demo that is missing or neither image, folder nor video; the message names it."""


@dataclass(frozen=True)
class _Job:
    """One input file and, without suffix, the output it becomes."""

    source: Path
    target: Path
    is_video: bool


def run_demo(predictor: Predictor, inputs: Sequence[str], output: str, *, min_score: float = 0.5) -> list[str]:
    """Writes a picture or video with the predictions for every input, and `predictions.json` with all of them.

    For a detector, the JSON is a list in COCO's result format; "file_name" and "category_name" are added, and image ids
    count the pictures (for videos, the frames) from 1. For a segmentor, each picture has a label map beside it,
    `NAME_labels.png`, with the values that the data set's label maps have, and the JSON lists the share of every class
    that was found. For a classifier, pictures have the five best classes as bars beside the image, and the JSON lists
    them with their scores, best first.

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
        picture, found = _predict(predictor, image, image_id, target, min_score, draw_detections)
        results += _named(found, str(job.source))
        _save_picture(picture, job.target.with_name(job.target.name + ".jpg"))
    with write_atomically(os.path.join(output, "predictions.json"), "w") as file:
        json.dump(results, file)
    return errors


def draw_detections(image: np.ndarray, instances: Instances, predictor: Predictor) -> np.ndarray:
    """The image with boxes, masks, class names and scores drawn on it.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: Detections in pixels of the image.
        predictor: Gives the names of the classes.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    return Visualizer(image, predictor.metadata).draw_instance_predictions(instances).get_image()


def draw_classes(image: np.ndarray, classes: Sequence[tuple[int, float]], predictor: Predictor) -> np.ndarray:
    """The image with names and scores of classes as bars beside it, or below if it is wide.

    Args:
        image: (H, W, 3) uint8, RGB.
        classes: Classes and their scores, from `Predictor.classify`.
        predictor: Gives the names of the classes.

    Returns:
        (H', W', 3) uint8, RGB; its size depends on that of the image and the number of classes alone.
    """
    return draw_bars(image, [(predictor.category(index).name, score) for index, score in classes])


def draw_segmentation(image: np.ndarray, labels: np.ndarray, predictor: Predictor) -> np.ndarray:
    """The image with the classes of its pixels painted over it and their names.

    Args:
        image: (H, W, 3) uint8, RGB.
        labels: Classes (H, W), from `Predictor.segment`.
        predictor: Gives names and colours of the classes.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    return Visualizer(image, predictor.metadata).draw_sem_seg(labels, alpha=0.5).get_image()


_Found = tuple[np.ndarray, list[dict[str, Any]]]  # a picture, and the entries of the JSON


def _predict(
    predictor: Predictor,
    image: np.ndarray,
    image_id: int,
    label_map: Path,
    min_score: float,
    draw: Callable[[np.ndarray, Instances, Predictor], np.ndarray],
) -> _Found:
    """What the model makes of an image; `draw` is for detections, which videos have drawn otherwise."""
    if predictor.task == "segmentation":
        return _segment(predictor, image, image_id, label_map)
    if predictor.task == "classification":
        return _classify(predictor, image, image_id)
    instances = predictor(image, min_score=min_score)
    return draw(image, instances, predictor), predictor.to_coco(instances, image_id)


def _classify(predictor: Predictor, image: np.ndarray, image_id: int) -> _Found:
    classes = predictor.classify(image)
    found = []
    for index, score in classes:
        category = predictor.category(index)
        entry = {"image_id": image_id, "category_id": category.id, "category_name": category.name, "score": score}
        found.append(entry)
    return draw_classes(image, classes, predictor), found


def _segment(predictor: Predictor, image: np.ndarray, image_id: int, target: Path) -> _Found:
    """The picture of a segmentation and what was found; the label map is written to `target`."""
    labels = predictor.segment(image)
    classes, counts = np.unique(labels, return_counts=True)
    categories = [predictor.category(int(index)) for index in classes]
    values = np.zeros(int(classes.max()) + 1, dtype=np.uint8)
    values[classes] = [category.id for category in categories]
    with write_atomically(str(target)) as file:
        Image.fromarray(values[labels]).save(file, format="PNG")
    found = [
        {"image_id": image_id, "category_id": category.id, "category_name": category.name, "share": count / labels.size}
        for category, count in zip(categories, counts.tolist(), strict=True)
    ]
    return draw_segmentation(image, labels, predictor), found


def collect_inputs(inputs: Sequence[str], output: str) -> list[_Job]:
    """Image and video files named by `inputs`, each with the output file it becomes.

    Raises:
        InputError: If an input is missing or neither image, folder nor video, or a folder has no image.
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
    return jobs


def _is_video(path: Path) -> bool:
    """Whether a file is a video, decided by its content: what Pillow knows is an image, however badly it decodes."""
    try:
        with Image.open(path, formats=image_formats()):
            return False
    except Exception:  # Pillow has no common error for "not an image"
        if path.suffix.lower() in image_endings():
            return False  # a broken image; reading it will say so
    av = _import_av(path)
    try:
        with av.open(str(path)) as container:
            if container.streams.video:
                return True
    except av.FFmpegError:
        pass
    raise InputError(f"{path}: neither an image nor a video that can be decoded")


def _import_av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: not an image; reading videos needs PyAV: pip install av") from error
    return av


def _run_on_video(predictor: Predictor, job: _Job, image_id: int, min_score: float) -> tuple[list[dict[str, Any]], int]:
    """Draws every frame; returns what was found and the last image id."""
    av = _import_av(job.source)
    results: list[dict[str, Any]] = []
    visualizer = VideoVisualizer(predictor.metadata)  # keeps an object's colour from frame to frame

    def draw(image: np.ndarray, instances: Instances, _: Predictor) -> np.ndarray:
        return visualizer.draw_instance_predictions(image, instances).get_image()

    with av.open(str(job.source)) as container:
        stream = container.streams.video[0]
        writer = _FrameWriter(av, job.target, stream.average_rate or Fraction(25))
        try:
            for frame in tqdm(
                container.decode(stream), total=stream.frames or None, desc=job.source.name, unit="frame"
            ):
                image = frame.to_ndarray(format="rgb24")
                image_id += 1
                target = job.target.with_name(f"{job.target.name}_{image_id:06d}_labels.png")
                picture, found = _predict(predictor, image, image_id, target, min_score, draw)
                results += _named(found, str(job.source))
                writer.write(picture)
        finally:
            writer.close()
    return results, image_id


class _FrameWriter:
    """Writes frames to an .mp4 file or, without a video encoder, as numbered pictures into a folder."""

    def __init__(self, av: Any, target: Path, rate: Fraction) -> None:
        self._av, self._target, self._rate = av, target, rate
        self._encoder = next(
            (name for name in _ENCODERS if name in av.codecs_available and _can_encode(av, name)), None
        )
        self._container: Any = None
        self._stream: Any = None
        self._count = 0
        if self._encoder is None:
            logger.warning("PyAV has none of the encoders %s: frames of %s are written as pictures", _ENCODERS, target)

    def write(self, image: np.ndarray) -> None:
        self._count += 1
        if self._encoder is None:
            self._target.mkdir(exist_ok=True)
            _save_picture(image, self._target / f"{self._count:06d}.jpg")
            return
        # The pixel format wants even sides
        image = np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
        if self._container is None:
            self._container = self._av.open(str(self._target.with_name(self._target.name + ".mp4")), "w")
            self._stream = self._container.add_stream(self._encoder, rate=self._rate)
            self._stream.height, self._stream.width = image.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(image, format="rgb24")))

    def close(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()


def _can_encode(av: Any, name: str) -> bool:
    try:
        return av.Codec(name, "w").is_encoder
    except (ValueError, av.FFmpegError):
        return False


def _named(results: list[dict[str, Any]], file_name: str) -> Iterator[dict[str, Any]]:
    return ({**result, "file_name": file_name} for result in results)


def _save_picture(image: np.ndarray, path: Path) -> None:
    with write_atomically(str(path)) as file:
        Image.fromarray(image).save(file, format="JPEG", quality=92)
