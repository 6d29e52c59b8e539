"""Data sets and a tiny configuration that the tests of the Detectron2 project share."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

_ROOT = Path(__file__).resolve().parents[3]
# Not contiguous, not sorted, not starting at 1: as in COCO
_CATEGORIES = [{"id": 40, "name": "disc"}, {"id": 3, "name": "square"}, {"id": 17, "name": "bar"}]
_SHAPES = {40: (1.0, 1.0), 3: (1.0, 1.0), 17: (2.0, 0.5)}
_COLOURS = {40: (220, 40, 40), 3: (40, 220, 40), 17: (40, 40, 220)}


@dataclass(frozen=True)
class CocoFiles:
    """Paths of a COCO-format data set."""

    annotations: Path
    images: Path

    def overrides(self, *parts: str) -> list[str]:
        """Command-line overrides that use it as training and/or test set."""
        pairs = [(part, key) for part in parts for key in ("annotations", "images")]
        return [f"data.{part}.{key}={getattr(self, key)}" for part, key in pairs]

    def read(self) -> dict:
        return json.loads(self.annotations.read_text())

    def write(self, data: dict) -> None:
        self.annotations.write_text(json.dumps(data))


def write_synthetic_coco(folder: Path, num_images: int = 6, seed: int = 0) -> CocoFiles:
    """Coloured discs, squares and bars on noise, with exact boxes and masks."""
    rng = np.random.default_rng(seed)
    files = CocoFiles(folder / "annotations.json", folder / "images")
    files.images.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        width, height = (160, 120) if image_id % 2 else (96, 128)
        picture = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
        for _ in range(3):
            category = _CATEGORIES[rng.integers(3)]["id"]
            w, h = (float(side * rng.integers(20, 32)) for side in _SHAPES[category])
            x, y = (float(rng.integers(0, int(limit - side))) for limit, side in ((width, w), (height, h)))
            draw = ImageDraw.Draw(picture).ellipse if category == 40 else ImageDraw.Draw(picture).rectangle
            draw([x, y, x + w - 1, y + h - 1], fill=_COLOURS[category])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        name = f"{image_id:03d}.png"
        picture.save(files.images / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    files.write({"images": images, "categories": _CATEGORIES, "annotations": annotations})
    return files


_CLASS_COLOURS = {"blue": (30, 40, 220), "green": (40, 220, 30), "red": (220, 30, 40)}


@dataclass(frozen=True)
class ClassFolders:
    """Folders of training and test images."""

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def val(self) -> Path:
        return self.root / "val"

    def overrides(self) -> list[str]:
        return [f"data.train.images={self.train}", f"data.test.images={self.val}"]


def write_class_folder(folder: Path, per_class: int, seed: int) -> None:
    """Noise in one colour per class."""
    rng = np.random.default_rng(seed)
    for name, colour in _CLASS_COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def _write_class_folders(root: Path) -> ClassFolders:
    folders = ClassFolders(root)
    write_class_folder(folders.train, 4, 0)
    write_class_folder(folders.val, 3, 1)
    (folders.val / "red" / "2.png").write_bytes((folders.val / "blue" / "2.png").read_bytes())
    return folders


@pytest.fixture(autouse=True)
def heard_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `caplog` hear our logger although a training that ran before has set it up for itself."""
    monkeypatch.setattr(logging.getLogger("piip"), "propagate", True)


@pytest.fixture
def coco(tmp_path: Path) -> CocoFiles:
    """A synthetic data set that the test may damage."""
    return write_synthetic_coco(tmp_path / "coco")


@pytest.fixture(scope="session")
def shared_coco(tmp_path_factory: pytest.TempPathFactory) -> CocoFiles:
    """A synthetic data set to be left as it is."""
    return write_synthetic_coco(tmp_path_factory.mktemp("shared") / "coco")


@pytest.fixture(scope="session")
def perfect_ap() -> Callable[..., dict[str, float]]:
    """AP by task of predictions that equal the objects that are read for a test."""
    import pycocotools.mask as mask_util
    import torch
    from detectron2.structures import Boxes, BoxMode, Instances

    from piip.data import build_coco_evaluator, get_coco_dicts

    def raster(mask: list | dict, size: tuple[int, int]) -> np.ndarray:
        rle = mask_util.merge(mask_util.frPyObjects(mask, *size)) if isinstance(mask, list) else mask
        return mask_util.decode(rle).astype(bool)

    def evaluate(path: Path, images: Path, *, masks: bool, **kwargs: object) -> dict[str, float]:
        evaluator = build_coco_evaluator(str(path), require_masks=masks, **kwargs)
        evaluator.reset()
        test = {"filter_empty": False, "drop_boxes": False, "require_masks": masks}
        for record in get_coco_dicts(str(path), str(images), **test):
            objects = [annotation for annotation in record["annotations"] if not annotation["iscrowd"]]
            size = record["height"], record["width"]
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
            found = Instances(size, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
            found.scores = torch.ones(len(objects))
            found.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
            if masks:
                rasters = np.array([raster(a["segmentation"], size) for a in objects], dtype=bool)
                found.pred_masks = torch.tensor(rasters.reshape(-1, *size))
            evaluator.process([record], [{"instances": found}])
        return {task: metrics["AP"] for task, metrics in evaluator.evaluate().items()}

    return evaluate


@pytest.fixture(scope="session")
def tiny_config() -> str:
    """Path of the LazyConfig of a small Mask R-CNN."""
    return str(Path(__file__).with_name("tiny_mask_rcnn.py"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return _ROOT


@pytest.fixture(scope="session")
def launch(free_port) -> Callable[..., list[list[int]]]:
    """Trains on two processes: runs `launched_training.py` with phases of runs, all of one configuration.

    Returns the exit statuses of the two processes of each phase, the first to end first.
    """

    def run(folder: Path, config: str, *phases: list[dict]) -> list[list[int]]:
        with_config = [[{"config_file": config, **spec} for spec in specs] for specs in phases]
        (folder / "phases.json").write_text(json.dumps(with_config))
        # A module of DeepSpeed compiles a function when it is imported, which loads PyTorch's compiler in every process
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        script = Path(__file__).with_name("launched_training.py")
        files = [str(script), str(folder / "phases.json"), str(folder / "statuses.json")]
        command = [sys.executable, *files, free_port()]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        print(result.stdout[-3000:], result.stderr[-6000:])
        return json.loads((folder / "statuses.json").read_text())

    return run


@pytest.fixture(scope="session")
def formula_image() -> Callable[..., np.ndarray]:
    """The integer formula of the `pipe_*` goldens: images without a file."""

    def make(height: int, width: int, k: int, channels: int = 3) -> np.ndarray:
        y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
        value = 3 * x + 2 * y + 40 * c + 60 * ((x // (5 + k) + y // 7) % 2)
        value += (7919 * x + 104729 * y + 1299709 * c + (31 + k) * x * y) // 64 % 64
        return (value % 256).astype(np.uint8)

    return make


@pytest.fixture
def folders(tmp_path: Path) -> ClassFolders:
    """Twelve training and nine test images of three classes, of which one is not what it says; to be damaged."""
    return _write_class_folders(tmp_path / "images")


@pytest.fixture(scope="session")
def shared_folders(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """The same, to be left as they are."""
    return _write_class_folders(tmp_path_factory.mktemp("classes") / "images")
