"""The report of a run: curves, what an evaluation found, examples of the training images, in one HTML file."""

from __future__ import annotations

import base64
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.structures import BitMasks
from detectron2.utils.colormap import colormap
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from piip.charts import COLOURS, Boxes, Section, draw_curves, draw_images, read_metrics
from piip.data import TrainLoader, read_image
from piip.data.label_maps import label_classes, read_label_map
from piip.hooks import BEST_NOTE, BestModel
from piip.lazy_config import data_kind
from piip.report_results import SECTIONS, blend
from piip_core.errors import UserError
from piip_core.files import read_json, write_atomically

logger = logging.getLogger(__name__)

REPORT = "report.html"
"""What `write_report` writes, beside a folder `report` with the pictures in it."""

_RESULTS = "results.json"
_EXAMPLES, _DRAWS = 3, 3  # training images that are shown, and how often each is augmented
_SCORES = {  # the curves that are drawn
    "bbox/AP": "box AP",
    "segm/AP": "mask AP",
    "sem_seg/mIoU": "mIoU",
    "classification/top1": "top-1 accuracy",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.7em; margin-bottom: 0 } h2 { margin: 2em 0 .3em; border-bottom: 1px solid #ddd }
nav a { margin-right: 1.2em } p { max-width: 60em } figure { margin: 0; overflow-x: auto }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .15em .9em; border-bottom: 1px solid #eee }
th:first-child { text-align: left !important }
summary { cursor: pointer; color: #06c }
"""


def write_report(
    cfg: DictConfig,
    folder: Path,
    scores: Mapping[str, float] | None = None,
    *,
    run: Path | None = None,
    loader: TrainLoader | None = None,
) -> Path:
    """Writes `report.html` in a folder, and the pictures beside it; it opens without a server.

    Args:
        cfg: LazyConfig of the run.
        folder: Where an evaluation has left its predictions (`inference`).
        scores: That evaluation's, by name ("bbox/AP"). None: what an earlier report says of one stays.
        run: Folder of the training, with its curves; None: `folder`.
        loader: Of the training images; None: that of the configuration.

    Raises:
        UserError: If the predictions or a picture cannot be read or written.
    """
    pictures, run = folder / "report", run or folder
    pictures.mkdir(parents=True, exist_ok=True)
    sections = [*_curves(run, pictures), *_results(cfg, folder, pictures, scores)]
    sections += _augmentations(cfg, run, pictures, loader)
    path = folder / REPORT
    with write_atomically(path, "w") as file:
        file.write(_page(f"Report of {run.resolve().name}", sections, pictures))
    logger.info("Report: %s", path)
    return path


def _curves(run: Path, pictures: Path) -> Iterator[Section]:
    file = run / "metrics.json"
    if not file.is_file():
        return
    curves = read_metrics(file)
    losses = {name: curve for name, curve in curves.items() if "loss" in name and "/" not in name}
    names = _SCORES | {f"ema/{key}": f"{name}, averaged weights" for key, name in _SCORES.items()}
    shown = {name: curves[key] for key, name in names.items() if key in curves}
    if not losses:
        return
    draw_curves(pictures / "curves.png", losses, shown, {"lr": curves["lr"]} if "lr" in curves else {})
    best = run / BEST_NOTE
    text = "The weights kept are those of iteration {iteration}: {metric} {value:.1f}." if best.is_file() else ""
    yield Section("Training", text.format_map(read_json(best)) if text else text, "curves.png")


def _results(cfg: DictConfig, folder: Path, pictures: Path, scores: Mapping[str, float] | None) -> Iterator[Section]:
    """Of the evaluation, or of an earlier report; these are kept beside the pictures."""
    note = pictures / _RESULTS
    if scores is None:
        if note.is_file():
            yield from (Section(**section) for section in read_json(note)["sections"])
        return
    sections = [_summary(scores)]
    make = SECTIONS.get(data_kind(cfg) or "")
    if make is not None:
        parts = make(cfg, folder / "inference", pictures)
        sections += tqdm(parts, "report", unit="section", delay=2, disable=None)
    with write_atomically(note, "w") as file:
        json.dump({"sections": [section._asdict() for section in sections]}, file)
    yield from sections


def _summary(scores: Mapping[str, float]) -> Section:
    tasks: dict[str, dict[str, str]] = defaultdict(dict)
    for key, value in scores.items():
        task, _, name = key.partition("/")
        if "-" not in name:  # which are those of classes
            tasks[task][name] = "–" if np.isnan(value) else f"{value:.1f}"
    names = list(dict.fromkeys(name for found in tasks.values() for name in found))
    rows = [("", *names), *((task, *(found.get(name, "") for name in names)) for task, found in tasks.items())]
    return Section("Scores", "Of the validation images, in percent; – where there are no objects.", rows=rows)


def _augmentations(cfg: DictConfig, run: Path, pictures: Path, loader: TrainLoader | None) -> Iterator[Section]:
    """Training images as they are, and as the model sees them; drawn once."""
    path = pictures / "augmentation.jpg"
    if data_kind(cfg) is None or not (run / "metrics.json").is_file():
        return
    try:
        if not path.is_file():
            loader = loader or instantiate(cfg.dataloader.train)
            _draw_augmentations(cfg, loader.dataset, path)
    except UserError as error:
        yield Section("Augmentation", f"The training images cannot be shown: {error}")
        return
    text = "Training images as they are, on the left, and as the model is given them."
    yield Section("Augmentation", text, path.name)


def _draw_augmentations(cfg: DictConfig, dataset: Any, path: Path) -> None:
    palette = colormap(rgb=True).astype(np.uint8)
    panels: list[tuple[str, np.ndarray, Boxes]] = []
    for number in range(min(_EXAMPLES, len(dataset))):
        index = number * len(dataset) // _EXAMPLES
        record = dataset.dicts[index]
        image = read_image(record["file_name"])
        if "sem_seg_file_name" in record:
            known = label_classes(cfg.data.classes, cfg.data.get("reduce_zero_label"))
            image = blend(image, read_label_map(record["sem_seg_file_name"], known), palette)
        boxes = [(entry["bbox"], "", _colour(entry["category_id"])) for entry in record.get("annotations", ())]
        panels.append((Path(record["file_name"]).name, image, boxes))
        for seed in range(_DRAWS):
            seen = _seen(dataset[index, seed], cfg.dataloader.train.mapper.image_format, palette)
            panels.append(("as the model sees it", *seen))
    draw_images(path, panels, _DRAWS + 1)


def _seen(sample: Mapping[str, Any], image_format: str, palette: np.ndarray) -> tuple[np.ndarray, Boxes]:
    """What a model is given: image and boxes, labels or masks blended in."""
    image = sample["image"].numpy().transpose(1, 2, 0).clip(0, 255).astype(np.uint8)
    image = image[..., ::-1] if image_format == "BGR" else image
    if "sem_seg" in sample:
        image = blend(image, sample["sem_seg"].numpy(), palette)
    boxes = []
    if "instances" in sample:
        objects = sample["instances"]
        classes = objects.gt_classes.tolist()
        if isinstance(getattr(objects, "gt_masks", None), BitMasks):
            labels = np.full(image.shape[:2], 255)
            for mask, category in zip(objects.gt_masks, classes, strict=True):
                labels[mask.numpy()] = category
            image = blend(image, labels, (np.array(COLOURS) * 255).astype(np.uint8))
        for (left, top, right, bottom), category in zip(objects.gt_boxes.tensor.tolist(), classes, strict=True):
            boxes.append(((left, top, right - left, bottom - top), "", _colour(category)))
    return image, boxes


def _colour(category: int) -> Any:
    return COLOURS[category % len(COLOURS)]


def _page(title: str, sections: list[Section], pictures: Path) -> str:
    links = "".join(f'<a href="#{number}">{escape(section.title)}</a>' for number, section in enumerate(sections))
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    parts = [f"{head}<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><nav>{links}</nav>"]
    for number, section in enumerate(sections):
        parts.append(f'<h2 id="{number}">{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>')
        if section.picture:
            file = pictures / section.picture
            kind = "jpeg" if file.suffix == ".jpg" else "png"
            content = base64.b64encode(file.read_bytes()).decode()
            source = f"data:image/{kind};base64,{content}"
            parts.append(f'<figure><img alt="{escape(section.title)}" src="{source}"></figure>')
        if section.rows:
            align = ("left", *["right"] * (len(section.rows[0]) - 1))
            table = tabulate(section.rows[1:], section.rows[0], "html", disable_numparse=True, colalign=align)
            parts.append(f"<details><summary>as a table</summary>{table}</details>" if section.folded else table)
    return "\n".join([*parts, "</body></html>\n"])


class RunReport(HookBase):
    """Writes the report after every evaluation that is the best so far, and at the end; the main process runs it.

    A report that cannot be written ends no training. Follows the hooks that evaluate, keep the best and write metrics.
    """

    def __init__(self, cfg: DictConfig, loader: Any, best: BestModel | None) -> None:
        self._cfg, self._loader, self._best = cfg, loader, best

    def after_step(self) -> None:
        """Writes it if there was an evaluation that is the best."""
        if scores := self._new_scores():
            self._write(scores)

    def after_train(self) -> None:
        """Writes it with all curves."""
        self._write(self._new_scores())

    def _new_scores(self) -> dict[str, float] | None:
        storage, done = self.trainer.storage, min(self.trainer.iter + 1, self.trainer.max_iter)
        if self._best is not None and self._best.iteration != done:
            return None
        new = {name: value for name, (value, step) in storage.latest().items() if step == storage.iter}
        averaged = {name.removeprefix("ema/"): value for name, value in new.items() if name.startswith("ema/")}
        tasks = {name.split("/")[0] for name in _SCORES}
        return {name: value for name, value in (averaged or new).items() if name.split("/")[0] in tasks} or None

    def _write(self, scores: dict[str, float] | None) -> None:
        try:
            write_report(self._cfg, Path(self._cfg.train.output_dir), scores, loader=self._loader)
        except Exception:
            logger.exception("The report could not be written: training goes on without")
