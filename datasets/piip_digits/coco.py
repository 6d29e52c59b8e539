"""The digit scenes as a data set on disk: in the layout and format of COCO, and with label maps."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from piip_core.errors import check

from .data_folder import write_data_folder
from .scenes import NUM_CLASSES, Scene, SceneConfig, scenes

__all__ = ["prepare_digits"]

_FORMAT = 2  # raise it when the same parameters would give other files: data sets already there are then rebuilt


def prepare_digits(
    root: Path | str, *, num_train: int = 2000, num_val: int = 200, config: SceneConfig | None = None
) -> bool:
    """Writes the digit scenes below a folder, unless they are there already; returns whether it wrote them.

    The folder then holds `annotations/instances_{train,val}.json`, the images in `train` and `val`, a label map for
    each in `labels/train` and `labels/val` (0 for the background, 1 + d for what is in sight of a digit d) with the
    names of their values in `labels/names.txt`, and a manifest with the parameters. Masks are run-length encoded
    (digits have holes, which COCO polygons cannot say).

    Args:
        root: Folder of the data set, commonly `datasets/digits`.
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        config: Look of the scenes.

    Raises:
        UserError: If a number of scenes is not positive, or the folder holds something that this did not write.
    """
    config = config or SceneConfig()
    counts = {"train": num_train, "val": num_val}
    for split, count in counts.items():
        check(count >= 1, f"num_{split}", count, "at least 1")

    def write(folder: Path) -> None:
        (folder / "annotations").mkdir()
        for split, count in counts.items():
            _write_split(folder, split, count, config)
        (folder / "labels" / "names.txt").write_text("\n".join(["background", *map(str, range(NUM_CLASSES))]) + "\n")

    return write_data_folder(Path(root), {"format": _FORMAT, "scenes": counts, "config": asdict(config)}, write)


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
        "info": {"description": f"Handwritten digits on photographs, {split}", "version": str(_FORMAT)},
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
