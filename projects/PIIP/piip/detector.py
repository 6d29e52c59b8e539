"""Train, use and evaluate a model of this project on own images, in a few lines; `piip.cli` is the same as commands."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from piip.compose import DEFAULT_MODELS, TrainOptions, compose, find_model, write_config
from piip.data import read_image
from piip.data.folders import read_folder
from piip.distributed import start
from piip.hooks import BEST, BEST_NOTE
from piip.lazy_config import data_kind, load_config
from piip.predict import Predictor
from piip.report import REPORT, write_report
from piip.train import EVALUATION, main
from piip_core import zoo
from piip_core.errors import CheckpointError, ConfigError, UserError, check
from piip_core.files import read_json
from piip_core.images import check_values, plain_rgb, upright

_KINDS = {"detect": "coco", "segment": "coco", "semantic": "label_maps", "classify": "class_folders"}
_RECORD = re.compile(r"\[\d\d/\d\d \d\d:\d\d:\d\d")  # what the records of a log begin with
_SHOWN = re.compile(
    r"iter: |copypaste: |WARNING|ERROR|Best .* so far|not risen|memory of the GPU|GiB an image|Nothing to train"
)


@dataclass(frozen=True)
class Predictions:
    """What a model found in one image.

    Attributes:
        boxes: (N, 4), left, top, right and bottom in pixels; None unless a detector.
        masks: (N, H, W) bool; None without. Of a segmentor, one for each class that was found.
        scores: (N,), from 0 to 1, best first; None of a segmentor.
        classes: (N,) indices.
        names: Names of the classes, N of them.
    """

    boxes: np.ndarray | None
    masks: np.ndarray | None
    scores: np.ndarray | None
    classes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.classes)

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`; class names under "class_name".

        Raises:
            UserError: If there are neither boxes nor masks, or supervision is not installed.
        """
        if self.boxes is None and self.masks is None:
            raise UserError("a classifier's predictions have neither boxes nor masks: expected those of a detector")
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision needs the package supervision: pip install supervision") from None
        boxes = supervision.mask_to_xyxy(self.masks) if self.boxes is None else self.boxes
        names = {"class_name": np.array(self.names, dtype=str)}
        found = {"mask": self.masks, "confidence": self.scores, "class_id": self.classes}
        return supervision.Detections(xyxy=boxes, **found, data=names)


class Detector:
    """A detector, segmentor or classifier: by the name of a model, of a checkpoint, or of the folder of a run.

    Args:
        model: A model of `piip models`, a folder that `train` wrote, or a checkpoint in such a folder. None: the
            default for the task of the data.
        task: "detect", "segment", "semantic" or "classify": of a model that may be several.
        device: "cpu" or "cuda"; None: a GPU if there is one.
        image_size: Long side to which a detector's images or tiles are resized; None: the model's.

    Raises:
        UserError: If there is no such model.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        task: str | None = None,
        device: str | None = None,
        image_size: int | None = None,
    ) -> None:
        self.task, self.device, self.image_size = task, device, image_size
        self._predictor: Predictor | None = None
        self._name: str | None = None
        self._run: Path | None = None
        self._weights: str | None = None
        path = Path(model) if model is not None else None
        if path is not None and (path / "config.yaml").is_file():
            self._run = path
        elif path is not None and path.is_file():
            self._run, self._weights = path.parent, str(path)
        elif path is not None and (path.is_dir() or len(path.parts) > 1):
            raise ConfigError(f"{model}: no config.yaml in it: expected the folder of a run, or a checkpoint there")
        elif model is not None:
            self._name = find_model(str(model), task).name
        if self._run is not None and not (self._run / "config.yaml").is_file():
            raise ConfigError(f"{model}: expected a config.yaml beside it, as `piip train` writes")

    def train(self, data: str | Path, *, output: str | Path | None = None, **options: Any) -> dict[str, float]:
        """Trains on a folder of images, whose form is recognised, or goes on with it: see `piip train --help`.

        Afterwards this object is the trained model.

        Args:
            data: Folder; see `piip.data.folders.read_folder`.
            output: Folder of the run. What is there already is gone on with.
            options: Of `TrainOptions`, and `form` (of the data) and `validation` (part of the images held out).

        Returns:
            Name, value and iteration of the best score, as in `best.json`.
        """
        if self._run is not None and self._name is None:
            raise ConfigError(f"{self._run}: is trained: name its model, and weights={self._find_weights()}, for more")
        form, share = options.pop("form", None), options.pop("validation", 0.2)
        given = TrainOptions(**{"task": self.task, "device": self.device, **options})
        source = Path(data).resolve()
        run = Path(output or Path("output", (source.parent if source.is_file() else source).name))
        fresh = not (run / "last_checkpoint").is_file()
        how = dict(form=form, share=share, seed=given.seed, overwrite=fresh)
        found = read_folder(data, run / "converted", **how)
        print(f"{data}: {found}")
        name = self._name or DEFAULT_MODELS.get(given.task or found.task)
        cfg, lines = compose(found, name, run, given)
        print(*lines, f"everything goes to {run}", sep="\n", flush=True)
        file = write_config(cfg, run)
        _start(_arguments(file, opts=list(given.overrides), resume=True, num_gpus=given.gpus))
        self._name, self._run, self._weights, self._predictor = name, run, None, None
        print(f"open {run / REPORT}")
        note = run / BEST_NOTE
        return read_json(note) if note.is_file() else {}

    def predict(
        self,
        images: str | Path | np.ndarray | Image.Image | Sequence[Any],
        *,
        min_score: float = 0.5,
        tiles: int | bool = False,
    ) -> Predictions | list[Predictions]:
        """Finds what is in images.

        Args:
            images: Path, PIL image or array (H, W, 3) uint8 RGB; or several, for a list of results.
            min_score: Lowest score of a detection.
            tiles: Side in pixels of tiles to look at, besides the whole image, by the library sahi; True: as large as
                the model sees without resizing.

        Raises:
            UserError: If an image cannot be read, or there are no weights; of tiles, without sahi or a detector.
        """
        check(0 <= min_score <= 1, "min_score", min_score, "0 to 1")
        if isinstance(images, str | Path | np.ndarray | Image.Image):
            return self._predict(images, min_score, self.tile_size(tiles))
        return [self._predict(image, min_score, self.tile_size(tiles)) for image in images]

    def tile_size(self, tiles: int | bool) -> int | None:
        """Side of the tiles that `predict` looks at, in pixels; None: there are none."""
        if tiles is False:
            return None
        scales = self._config().data.get("test", {}).get("scales")
        if self.predictor.task != "detection" or not scales:
            raise ConfigError(f"tiles={tiles}: goes with a detector only, not with a model for {self.predictor.task}")
        size = max(min(scale) for scale in scales) if tiles is True else tiles
        check(size >= 32, "tiles", size, "at least 32")
        return size

    def evaluate(self, data: str | Path | None = None, *, form: str | None = None) -> dict[str, Any]:
        """Scores on the validation images of the run, or of a folder: on all of it, where it has no such part.

        Writes report.html and all that belongs to it to `evaluation` in the folder of the run, or output/NAME.

        Returns:
            Metrics by task: {"bbox": {"AP": ...}, ...}.
        """
        cfg, weights = self._config(), self._find_weights()
        output = (self._run or Path("output", self._name or "")) / "evaluation"
        settings: dict[str, Any] = {}
        if data is not None:
            found = read_folder(data, output / "converted", form=form, share=0.0)
            print(f"{data}: {found}")
            if data_kind(cfg) not in (None, _KINDS[found.task]):
                raise UserError(f"{data}: {found.form}: expected data of the kind that the model was trained with")
            settings = found.settings
            for key in ("annotations", "images", "labels"):  # the training part is all there is
                if found.counts[1] == 0 and f"data.train.{key}" in settings:
                    settings[f"data.test.{key}"] = settings[f"data.train.{key}"]
            settings = {key: value for key, value in settings.items() if not key.startswith("data.train.")}
        for key, value in {**settings, "train.output_dir": str(output), "train.init_checkpoint": weights}.items():
            OmegaConf.update(cfg, key, value)
        _start(_arguments(write_config(cfg, output), eval_only=True))
        results = read_json(output / EVALUATION)
        print(f"open {write_report(cfg, output, flatten_results_dict(results), run=self._run)}")
        return results

    def export(
        self,
        path: str | Path,
        image: Any = None,
        *,
        gridsample: bool = True,
        fp16: bool = False,
        int8: bool = False,
    ) -> str:
        """Writes the whole detector as ONNX, for images of one size; returns how it compares with PyTorch.

        With fp16 or int8, what is compared is the file before the conversion.

        Args:
            path: File that ends in .onnx; see `piip.export.export_detector`.
            image: An example with objects, as for `predict`, whose size after resizing becomes that of all images.
                None: a validation image of the run.
            gridsample: False: without that operator, which TensorRT has had wrong.
            fp16: Backbone in float16.
            int8: Backbone in int8, scaled to what occurs in some training images of the run.

        Raises:
            UserError: If the model is no detector that can be exported, or finds nothing in the image.
        """
        from piip.export import export_detector

        if Path(path).suffix != ".onnx" or Path(path).is_dir():
            raise UserError(f"{path}: expected a file name that ends in .onnx")
        predictor = Predictor(self._config(), self._find_weights(), device="cpu")
        if predictor.task != "detection":
            raise UserError(f"{path}: a model for {predictor.task}: tools/export_model.py writes its ONNX file")
        images = self._some_images("test") if image is None else [image]
        found = next((array for array in map(_to_array, images) if len(predictor(array))), None)
        if found is None:
            raise UserError(
                f"{path}: the model finds nothing in the images: expected one with objects, to compare with"
            )
        example = predictor.to_input(found)
        resized = [predictor.to_input(_to_array(each)) for each in (self._some_images("train") if int8 else ())]
        options = {"gridsample": gridsample, "half": fp16, "names": [each.name for each in predictor.categories]}
        return str(export_detector(predictor.model, Path(path), example, calibration=resized, **options))

    def _some_images(self, part: str) -> list[str]:
        """Paths of a few for "train" or "test"."""
        if self._run is None:
            raise ConfigError(f"{self._name}: has no images of its own: expected an image, and no int8")
        data = self._config().data[part]
        return [os.path.join(data.images, image["file_name"]) for image in read_json(data.annotations)["images"][:32]]

    @property
    def predictor(self) -> Predictor:
        """The model with its weights, as `piip.predict` has it."""
        if self._predictor is None:
            self._predictor = Predictor(self._config(), self._find_weights(), device=self.device)
        return self._predictor

    def _predict(self, image: Any, min_score: float, tiles: int | None) -> Predictions:
        predictor, image = self.predictor, _to_array(image)
        if predictor.task == "classification":
            best = predictor.classify(image)
            classes, scores = np.array([index for index, _ in best]), np.array([score for _, score in best])
            boxes = masks = None
        elif predictor.task == "segmentation":
            labels = predictor.segment(image)
            classes, scores, boxes = np.unique(labels), None, None
            masks = labels == classes[:, None, None]
        else:
            found = predictor(image, min_score=min_score, tiles=tiles)
            boxes, scores = found.pred_boxes.tensor.numpy(), found.scores.numpy()
            classes = found.pred_classes.numpy()
            masks = found.pred_masks.numpy() if found.has("pred_masks") else None
        names = [predictor.category(int(index)).name for index in classes]
        return Predictions(boxes, masks, scores, classes, names)

    def _config(self) -> DictConfig:
        """The run's, or the recipe of the named model."""
        if self._run is None and self._name is None:
            raise ConfigError("no model: name one, or train first")
        file = self._run / "config.yaml" if self._run else find_model(str(self._name), self.task).config_file
        cfg = load_config(str(file))
        cfg.train.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.image_size is not None:
            check(self.image_size >= 32, "image_size", self.image_size, "at least 32")
            if "scales" not in cfg.data.get("test", {}):
                raise ConfigError(f"image_size={self.image_size}: goes with a detector only")
            cfg.data.test.scales = [[self.image_size, self.image_size]]
        return cfg

    def _find_weights(self) -> str:
        if self._weights is not None:
            return self._weights
        if self._run is None:
            name = str(self._name)
            if name in {found.entry.name for found in zoo.released_models()}:
                return name
            raise CheckpointError(f"{name}: no weights were released: train it first (piip train --model {name})")
        last = self._run / "last_checkpoint"
        files = [self._run / BEST, self._run / "model_final.pth"]
        files += [self._run / last.read_text().strip()] if last.is_file() else []
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise CheckpointError(f"{self._run}: holds no checkpoint yet: go on with its training")
        return str(found)


def _to_array(image: str | Path | np.ndarray | Image.Image) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(str(image))
    if isinstance(image, Image.Image):
        check_values("image", image)
        return np.asarray(plain_rgb(upright(image)))
    if not isinstance(image, np.ndarray):
        raise UserError(f"{type(image).__name__}: expected a path, a PIL image or an array (H, W, 3) uint8")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype != np.uint8:
        raise UserError(f"image of shape {image.shape}, {image.dtype}: expected (H, W, 3) uint8, RGB")
    return image


class _Brief(TextIOBase):
    """Passes on progress, scores and warnings of a log, whose rest is in log.txt."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._shown = stream, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            if _RECORD.search(line):
                self._shown = bool(_SHOWN.search(line))
            if self._shown:
                self._stream.write(line)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _start(args: argparse.Namespace) -> None:
    """Trains or evaluates as `tools/lazyconfig_train_net.py` does, with less on the screen."""
    loggers = [logging.getLogger(name) for name in ("piip", "detectron2", "fvcore")]
    before = [(each, list(each.handlers), each.propagate, each.level) for each in loggers]
    try:
        with redirect_stdout(_Brief(sys.stdout)):
            start(main, args)
    finally:  # another run in this process has a log of its own
        for each, handlers, propagate, level in before:
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)
        setup_logger.cache_clear()


def _arguments(file: Path, **given: Any) -> argparse.Namespace:
    """Those of `tools/lazyconfig_train_net.py`."""
    defaults = {"opts": [], "resume": False, "eval_only": False, "num_gpus": 1}
    machines = {"num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return argparse.Namespace(config_file=str(file), **{**defaults, **machines, **given})
