"""A small data set of images and label maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("ground", "disc", "bar")


@dataclass(frozen=True)
class LabelFiles:
    """Folders of images and label maps, and the names of the classes."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def labels(self) -> Path:
        return self.root / "labels"

    @property
    def classes(self) -> Path:
        return self.root / "names.txt"

    def overrides(self, *parts: str) -> list[str]:
        """Command-line overrides that use it as training and/or test set."""
        folders = [f"data.{part}.{key}={self.root / key}" for part in parts for key in ("images", "labels")]
        return [*folders, f"data.classes={self.classes}"]


def write_label_set(root: Path, count: int = 6) -> LabelFiles:
    """Noise with a rectangle of another class in it, and some pixels to ignore; sizes differ."""
    files, rng = LabelFiles(root), np.random.default_rng(0)
    files.images.mkdir(parents=True)
    files.labels.mkdir()
    files.classes.write_text("\n".join(NAMES) + "\n")
    for index in range(1, count + 1):
        height, width = (40, 56) if index % 2 else (64, 48)
        labels = np.zeros((height, width), dtype=np.uint8)
        labels[10:30, 5:35] = 1 + index % 2
        labels[:2] = 255
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(files.images / f"{index}.png")
        Image.fromarray(labels).save(files.labels / f"{index}.png")
    return files


@pytest.fixture
def files(tmp_path: Path) -> LabelFiles:
    """A data set that the test may damage."""
    return write_label_set(tmp_path / "mine")


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> LabelFiles:
    """A data set to be left as it is."""
    return write_label_set(tmp_path_factory.mktemp("label_maps") / "mine")
