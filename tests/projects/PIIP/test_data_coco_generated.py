"""Generated COCO-format files: whatever is in them, they are read as they say and evaluated rightly, or refused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2")

import pycocotools.mask as mask_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piip.data import DatasetError, get_coco_dicts

# More files than a quick run takes, and others each time: PIIP_PROPERTY_EXAMPLES=2000 pytest THIS_FILE
_EXAMPLES = int(os.environ.get("PIIP_PROPERTY_EXAMPLES", 0))
_BOM = b"\xef\xbb\xbf"
_FULL = {"bbox": pytest.approx(100), "segm": pytest.approx(100)}


def _pixels(mask: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool, by pycocotools."""
    rle = mask_util.frPyObjects(mask, height, width) if isinstance(mask, list) else mask
    return mask_util.decode(mask_util.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def _polygon(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@dataclass
class _Object:
    """What an annotation means."""

    image: int  # index
    category: int  # index
    box: list[float]
    crowd: bool
    mask: np.ndarray  # (height, width) bool
    has_area: bool


_SAME_FLAG = {False: [0, 0, False, "0", None, 0.0, ...], True: [1, True, "1", 1.0]}
_NEW_IDS = [
    lambda n: n,
    lambda n: -n,
    lambda n: n + 2**63,
    lambda n: n // 2,
    lambda n: float(n),
    str,
    lambda n: ...,
    bool,
]
# What ends in an error: key of an annotation and its value; the masks only for a model with masks
_BAD_FIELDS = [
    ("bbox", [1, 2, math.nan, 4]),
    ("bbox", [1, 2, 3]),
    ("iscrowd", "no"),
    ("ignore", 1),
    ("category_id", 99),
]
_BAD_MASKS = [
    lambda box, h, w: [_polygon([math.nan, *box[1:]])],
    lambda box, h, w: [_polygon([2e8, *box[1:]])],
    lambda box, h, w: [_polygon(box)[:-1]],
    lambda box, h, w: [_polygon(box)[:4]],
    lambda box, h, w: [[None, *_polygon(box)[1:]]],
    lambda box, h, w: {"size": [w, h], "counts": [h * w]},
    lambda box, h, w: {"size": [h, w], "counts": [h, h, h]},
    lambda box, h, w: {"size": [h, w], "counts": [0, h * w, h * w]},
    lambda box, h, w: {"size": [h, w], "counts": "0"},
    lambda box, h, w: None,
    lambda box, h, w: ...,
]


@st.composite
def _annotations(draw: st.DrawFn, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of an annotation but its ids, and of the `_Object` that it means."""
    some = lambda values: draw(st.sampled_from(values))  # noqa: E731
    whole = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    (height, width), crowd = size, some([False, False, False, True])
    x, y = whole(0, 4 * width - 2) / 4, whole(0, 4 * height - 2) / 4
    box = [x, y, whole(1, round(4 * (width - x))) / 4, whole(1, round(4 * (height - y))) / 4]
    polygon = _polygon(box)
    mask = _pixels([polygon], height, width)
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    ends = np.flatnonzero(np.diff(mask.flatten("F"), prepend=False, append=not mask[-1, -1]))
    masks = [
        [polygon],
        polygon,
        [polygon, [1, 1, 2, 2], []],
        {"size": [height, width], "counts": encoded},
        {"size": [float(height), width], "counts": np.diff(ends, prepend=0).tolist()},
    ]
    fields = {"bbox": box, "segmentation": some(masks), "iscrowd": some(_SAME_FLAG[crowd])}
    fields |= {
        "area": some([1, 99.5, 0, None, ..., "7", math.nan, -1, 1e11]),
    }
    meaning = {"box": box, "crowd": crowd, "mask": mask, "has_area": fields["area"] != 0}
    return fields, meaning


@st.composite
def _files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes, list[_Object], str]:
    """A file, the bytes before it, what its objects are, and what it is to be refused for: "", "field" or "mask"."""
    some = lambda values: draw(st.sampled_from(values))  # noqa: E731
    whole = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    sizes = [(whole(8, 40), whole(41, 70)) for _ in range(whole(1, 3))]
    image_id, category_id = (some([lambda n: n, lambda n: 7 - 3 * n, lambda n: n * 10**15]) for _ in range(2))
    new_id, may_float, categories = some(_NEW_IDS), some([lambda n: n, float]), whole(1, 3)
    annotations, objects = [], []
    for number in range(1, whole(1, 7) + 1):
        image, category = whole(0, len(sizes) - 1), whole(0, categories - 1)
        fields, meaning = draw(_annotations(sizes[image]))
        fields |= {"image_id": may_float(image_id(image)), "category_id": may_float(category_id(category))}
        annotations.append(fields | {"id": new_id(number)})
        objects.append(_Object(image, category, **meaning))
    last, refusal = annotations[-1], some(["", "", "", "field", "mask"])
    if refusal == "field":
        last.update([some(_BAD_FIELDS)])
    elif refusal == "mask":
        last["segmentation"] = some(_BAD_MASKS)(last["bbox"], *sizes[objects[-1].image])
    elif some([False, False, True]):
        last["bbox"] = some([[3, 3, 0, 3], [3, 3, 3, -1], [99, 3, 3, 3], [-9, -9, 3, 3], [3, 3, 1e-5, 3]])
        objects.pop()
    data = {
        "images": [
            {"id": may_float(image_id(n)), "file_name": f"{n}.png", "height": h, "width": may_float(w)}
            for n, (h, w) in enumerate(sizes)
        ],
        "categories": [{"id": may_float(category_id(n)), "name": f"Käfer {n}"} for n in range(categories)],
        "annotations": [
            {key: value for key, value in annotation.items() if value is not ...}
            for annotation in draw(st.permutations(annotations))
        ],
    }
    return data, some([b"", _BOM]), objects, refusal


def _described(objects: list[_Object], *, masks: bool) -> list[Any]:
    return sorted((o.image, o.category, *o.box, o.crowd, o.mask.tobytes() if masks else b"") for o in objects)


def _read(records: list[dict[str, Any]], names: list[str], *, masks: bool) -> list[_Object]:
    """Records in the terms of `_Object`; `names` are those of the categories in the order of their ids."""
    return [
        _Object(
            int(Path(record["file_name"]).stem),
            int(names[a["category_id"]].split()[1]),
            a["bbox"],
            bool(a["iscrowd"]),
            _pixels(a["segmentation"], record["height"], record["width"]) if masks else np.zeros(0),
            True,
        )
        for record in records
        for a in record["annotations"]
    ]


@settings(
    max_examples=_EXAMPLES or 60,
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(file=_files(), masks=st.booleans())
def test_any_file_is_read_as_it_says_or_refused(perfect_ap, file, masks):
    data, start, objects, refusal = file
    names = [c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])]
    with TemporaryDirectory() as folder:
        path = Path(folder, "annotations.json")
        path.write_bytes(start + json.dumps(data, ensure_ascii=False).encode())
        for image in data["images"]:
            Path(folder, image["file_name"]).touch()
        train = {"filter_empty": False, "require_masks": masks}
        if refusal == "field" or (refusal == "mask" and masks):
            # a crowd needs no mask to be trained around
            spared = refusal == "mask" and objects[-1].crowd
            for use in (
                lambda: get_coco_dicts(str(path), folder, **train),
                lambda: perfect_ap(path, Path(folder), masks=masks),
            ):
                try:
                    use()
                    assert spared
                except DatasetError as error:
                    assert str(error).startswith(f"{path}: 1 x annotation")
            return
        trained = _read(get_coco_dicts(str(path), folder, **train), names, masks=masks)
        usable = [o for o in objects if min(o.box[2:]) >= 1 and o.has_area]
        assert _described(trained, masks=masks) == _described(usable, masks=masks)

        tested = _read(get_coco_dicts(str(path), folder, drop_boxes=False, **train), names, masks=masks)
        visible = [o for o in objects if not masks or o.mask.any()]
        assert _described(tested, masks=masks) == _described(visible, masks=masks)
        metrics = perfect_ap(path, Path(folder), masks=masks)
        if any(not o.crowd for o in visible):
            assert metrics == (_FULL if masks else {"bbox": _FULL["bbox"]})
        else:
            assert all(math.isnan(value) for value in metrics.values())
