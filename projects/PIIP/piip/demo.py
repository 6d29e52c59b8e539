"""Predictions drawn on image files, folders and videos: the logic behind `tools/demo.py`."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from piip.data import Category, read_image
from piip.predict import Predictor
from piip_core.errors import UserError
from piip_core.files import atomic_path, explain_write_errors, write_atomically
from piip_core.images import image_endings

_Detect = Callable[[np.ndarray], Instances]


class _Job(NamedTuple):
    """One input file and, without suffix, the output it becomes."""

    source: Path
    target: Path
    is_video: bool


def run_demo(
    predictor: Predictor, inputs: Sequence[str], output: str, *, min_score: float = 0.5, tiles: int | None = None
) -> list[str]:
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
        tiles: Side of the tiles in which a detector looks at an image; None: it looks at all of it.

    Returns:
        One message per file that could not be read; the others are done all the same.

    Raises:
        UserError: If an input is missing or nothing that can be shown, or a folder has no image.
    """
    jobs = collect_inputs(inputs, output)
    detect = partial(predictor, min_score=min_score, tiles=tiles)
    with explain_write_errors(output):
        os.makedirs(output, exist_ok=True)
    results: list[dict[str, Any]] = []
    errors: list[str] = []
    image_ids = count(1)
    for job in tqdm(jobs, desc="inputs", unit="file", disable=len(jobs) == 1 and jobs[0].is_video):
        job.target.parent.mkdir(parents=True, exist_ok=True)
        if job.is_video:
            results += _run_on_video(predictor, job, image_ids, detect)
            continue
        try:
            image = read_image(str(job.source))
        except UserError as error:
            errors.append(str(error))
            continue
        drawn, found = _predict(predictor, image, next(image_ids), f"{job.target}_labels.png", detect)
        results += [{**result, "file_name": str(job.source)} for result in found]
        with write_atomically(f"{job.target}.jpg") as file:
            Image.fromarray(drawn).save(file, format="JPEG", quality=92)
    with write_atomically(os.path.join(output, "predictions.json"), "w") as file:
        json.dump(results, file)
    return errors


def collect_inputs(inputs: Sequence[str], output: str) -> list[_Job]:
    """Image and video files named by `inputs`, each with the output file it becomes.

    Raises:
        UserError: If an input is missing or neither image, folder nor video, a folder has no image, or a result would
            replace an input.
    """
    sources: list[tuple[Path, Path]] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in image_endings() and p.is_file())
            if not files:
                raise UserError(f"{text}: no image file in this folder or below it")
            sources += [(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            sources.append((path, Path(path.name)))
        else:
            raise UserError(f"{text}: no such file or folder (looked from {os.getcwd()})")
    jobs, taken = [], set()
    for source, relative in sources:
        # a.jpg becomes a, and a second one of that name a_2
        names = (relative.with_name(f"{relative.stem}_{number}") for number in count(2))
        target = Path(output, relative.with_suffix(""))
        while target in taken:
            target = Path(output, next(names))
        taken.add(target)
        jobs.append(_Job(source, target, _is_video(source)))
    written = {os.path.realpath(f"{job.target}{ending}") for job in jobs for ending in (".jpg", ".mp4", "_labels.png")}
    if lost := [str(job.source) for job in jobs if os.path.realpath(job.source) in written]:
        raise UserError(f"--output {output}: results would replace {lost[0]}: name another folder")
    return jobs


def draw_bars(image: np.ndarray, classes: Sequence[tuple[str, float]]) -> np.ndarray:
    """An image (H, W, 3), uint8 RGB, and beside it the names of classes with their scores (0 to 1) as bars."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.set_axis_off()
    names = [textwrap.shorten(name, 32, placeholder="…") for name, _ in classes]
    bars = right.barh(range(len(classes)), [score for _, score in classes])
    right.bar_label(bars, [f"{score:.1%}" for _, score in classes], padding=3)
    right.set(yticks=range(len(classes)), yticklabels=names, xlim=(0, 1.15), xticks=[])
    right.invert_yaxis()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _predict(
    predictor: Predictor,
    image: np.ndarray,
    image_id: int,
    label_map: str,
    detect: _Detect,
    video: VideoVisualizer | None = None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The image with what the model makes of it, and the entries of the JSON; `video` knows earlier images."""

    def entry(category: Category, **found: float) -> dict[str, Any]:
        return {"image_id": image_id, "category_id": category.id, "category_name": category.name, **found}

    if predictor.task == "detection":
        instances = detect(image)
        drawn = (video or VideoVisualizer(predictor.metadata)).draw_instance_predictions(image, instances)
        return drawn.get_image(), predictor.to_coco(instances, image_id)
    if predictor.task == "classification":
        best = [(predictor.category(index), score) for index, score in predictor.classify(image)]
        drawn = draw_bars(image, [(category.name, score) for category, score in best])
        return drawn, [entry(category, score=score) for category, score in best]
    labels = predictor.segment(image)
    classes, counts = np.unique(labels, return_counts=True)
    categories = [predictor.category(int(index)) for index in classes]
    values = np.zeros(int(classes.max()) + 1, dtype=np.uint8)
    values[classes] = [category.id for category in categories]
    with write_atomically(label_map) as file:
        Image.fromarray(values[labels]).save(file, format="PNG")
    shares = (counts / labels.size).tolist()
    found = [entry(category, share=share) for category, share in zip(categories, shares, strict=True)]
    return Visualizer(image, predictor.metadata).draw_sem_seg(labels, alpha=0.5).get_image(), found


def _is_video(path: Path) -> bool:
    """Whether a file is a video; images have an ending of their own, and reading a broken one will say so."""
    if path.suffix.lower() in image_endings():
        return False
    try:
        with av.open(str(path)) as container:
            if container.streams.video:
                return True
    except av.FFmpegError:
        pass
    raise UserError(f"{path}: neither an image nor a video that can be decoded")


def _run_on_video(predictor: Predictor, job: _Job, image_ids: Iterator[int], detect: _Detect) -> list[dict[str, Any]]:
    """Draws every frame; returns what was found."""
    results: list[dict[str, Any]] = []
    video = VideoVisualizer(predictor.metadata)  # keeps an object's colour from frame to frame
    encoder = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    written = None
    with (
        atomic_path(f"{job.target}.mp4") as aside,
        av.open(str(job.source)) as container,
        av.open(str(aside), "w", format="mp4") as output,
    ):
        stream = container.streams.video[0]
        for frame in tqdm(container.decode(stream), total=stream.frames or None, desc=job.source.name, unit="frame"):
            image_id = next(image_ids)
            label_map = f"{job.target}_{image_id:06d}_labels.png"
            drawn, found = _predict(predictor, frame.to_ndarray(format="rgb24"), image_id, label_map, detect, video)
            results += [{**result, "file_name": str(job.source)} for result in found]
            # The pixel format wants even sides
            drawn = np.ascontiguousarray(drawn[: drawn.shape[0] // 2 * 2, : drawn.shape[1] // 2 * 2])
            if written is None:
                written = output.add_stream(encoder, rate=stream.average_rate or Fraction(25))
                written.height, written.width, written.pix_fmt = *drawn.shape[:2], "yuv420p"
            output.mux(written.encode(av.VideoFrame.from_ndarray(drawn, format="rgb24")))
        if written is not None:
            output.mux(written.encode())
    return results
