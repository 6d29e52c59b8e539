"""The digits as data sets on disk: scenes in COCO's layout and with label maps, and single digits in class folders."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from piip_core.errors import UserError, check
from piip_core.files import publish_folder

from .scenes import NUM_CLASSES, SPLITS, Scene, SceneConfig, load_samples, scenes, split_samples

# Raise them when the same parameters would give other files: data sets already there are then rebuilt
_SCENES_FORMAT = 2
_IMAGES_FORMAT = 1


def prepare_digits(
    root: Path | str, *, num_train: int = 2000, num_val: int = 200, config: SceneConfig | None = None
) -> bool:
    """Writes the digit scenes below a folder, unless they are there already; returns whether it wrote them.

    The folder then holds `annotations/instances_{train,val}.json`, the images in `train` and `val`, a label map for
    each in `labels/train` and `labels/val` (0 for the background, 1 + d for what is in sight of a digit d) with the
    names of their values in `labels/names.txt`, and a manifest with the parameters. Masks are run-length encoded
    (digits have holes, which COCO polygons cannot say). A UserError says if a number of scenes is not positive, or the
    folder holds something that this did not write.
    """
    config, counts = config or SceneConfig(), _counts(num_train, num_val)

    def write(folder: Path) -> None:
        (folder / "annotations").mkdir()
        for split, count in counts.items():
            _write_split(folder, split, count, config)
        (folder / "labels" / "names.txt").write_text("\n".join(["background", *map(str, range(NUM_CLASSES))]) + "\n")

    return write_data_folder(Path(root), {"format": _SCENES_FORMAT, "scenes": counts, "config": asdict(config)}, write)


def prepare_yolo_digits(
    root: Path | str, *, num_train: int = 160, num_val: int = 40, config: SceneConfig | None = None
) -> bool:
    """Writes the boxes of the digit scenes as YOLO has them, unless they are there; returns whether it wrote them.

    The folder then holds `data.yaml`, `images/{train,val}` and `labels/{train,val}`. A UserError says what
    `prepare_digits` refuses, too.
    """
    config, counts = config or SceneConfig(), _counts(num_train, num_val)

    def write(folder: Path) -> None:
        for split, count in counts.items():
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True)
            drawn = tqdm(scenes(config, split, count), total=count, desc=f"Drawing {split} scenes", unit="scene")
            for index, scene in enumerate(drawn, start=1):
                Image.fromarray(scene.image).save(folder / "images" / split / f"{index:06d}.jpg", quality=92)
                height, width = scene.image.shape[:2]
                lines = []
                for digit in scene.digits:
                    x, y, w, h = digit.box
                    box = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                    lines.append(" ".join([str(digit.label), *(f"{value:.6f}" for value in box)]) + "\n")
                (folder / "labels" / split / f"{index:06d}.txt").write_text("".join(lines))
        names = [str(label) for label in range(NUM_CLASSES)]
        (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {json.dumps(names)}\n")

    settings = {"format": _SCENES_FORMAT, "yolo": counts, "config": asdict(config)}
    return write_data_folder(Path(root), settings, write)


def _counts(num_train: int, num_val: int) -> dict[str, int]:
    counts = {"train": num_train, "val": num_val}
    for split, count in counts.items():
        check(count >= 1, f"num_{split}", count, "at least 1")
    return counts


def prepare_digit_images(root: Path | str, *, image_size: int = 64) -> bool:
    """Writes scikit-learn's digits below a folder, unless they are there already; returns whether it wrote them.

    The folder then holds a PNG for each of the 1797 samples, `{train,val}/{0 ... 9}/{index}.png`, bright on black and
    smoothly enlarged, and a manifest. Every sample is in one split, the same as in the digit scenes. A UserError says
    if `image_size` is too small, or the folder holds something that this did not write.
    """
    check(image_size >= 8, "image_size", image_size, "at least 8, the size of the samples")

    def write(folder: Path) -> None:
        samples = load_samples()
        for split in SPLITS:
            for index in tqdm(split_samples(split), desc=f"Writing {split} digits", unit="digit"):
                path = folder / split / str(samples.target[index]) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                # Samples have values from 0 to 16; with empty pixels around, digits stay in the image when they turn
                grey = np.pad(np.round(samples.images[index] * (255 / 16)).astype(np.uint8), 1)
                Image.fromarray(grey).resize((image_size, image_size), Image.Resampling.BICUBIC).save(path)

    return write_data_folder(Path(root), {"format": _IMAGES_FORMAT, "image_size": image_size}, write)


def write_data_folder(root: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> bool:
    """Writes a data set with a manifest of its settings, unless it is there already; returns whether it was written.

    It is built under another name and renamed when complete; one made with other settings is replaced.

    Args:
        root: Folder of the data set.
        settings: Everything that its content depends on, ready for JSON.
        write: Writes the content into an empty folder.

    Raises:
        UserError: If the folder holds something else.
    """
    found, manifest = root / "manifest.json", json.dumps(settings, indent=1) + "\n"
    try:
        old = json.loads(found.read_text())
    except (OSError, ValueError):
        old = None
    ours = isinstance(old, dict) and old.keys() == settings.keys()
    if root.is_dir() and any(root.iterdir()) and not ours:
        raise UserError(f"{root} exists and is not a digit data set of this kind: move it away or name another folder")
    if old == json.loads(manifest):
        return False
    with publish_folder(root, overwrite=True, durable=False) as aside:
        write(aside)
        (aside / found.name).write_text(manifest)
    return True


def _write_split(root: Path, split: str, count: int, config: SceneConfig) -> None:
    """Writes the images, the label maps and the annotation file of a split."""
    for folder in (root / split, root / "labels" / split):
        folder.mkdir(parents=True)
    images, annotations = [], []
    drawn = tqdm(scenes(config, split, count), total=count, desc=f"Drawing {split} scenes", unit="scene")
    for image_id, scene in enumerate(drawn, start=1):
        name = f"{image_id:06d}.jpg"
        Image.fromarray(scene.image).save(root / split / name, quality=92)
        labels = np.zeros(scene.image.shape[:2], dtype=np.uint8)
        for digit in scene.digits:
            labels[digit.mask] = digit.label + 1
        Image.fromarray(labels).save(root / "labels" / split / f"{image_id:06d}.png")
        height, width = labels.shape
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "photo": scene.photo})
        annotations += _annotations(scene, image_id, first_id=len(annotations) + 1)
    # Category ids start at 1, as in COCO; the digit is the name.
    categories = [{"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(NUM_CLASSES)]
    content = {
        "info": {"description": f"Handwritten digits on photographs, {split}", "version": str(_SCENES_FORMAT)},
        "licenses": [],
        "images": images,
        "categories": categories,
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """COCO's annotations of a scene."""
    annotations = []
    for annotation_id, digit in enumerate(scene.digits, start=first_id):
        rle = coco_mask.encode(np.asfortranarray(digit.mask, dtype=np.uint8))
        annotations.append(
            {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": digit.label + 1,
                "bbox": list(digit.box),
                "area": int(digit.mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "sample": digit.sample,
            }
        )
    return annotations
