"""Reading of training logs, matching of predictions, and that drawings show what they are given."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from piip.digit_demo import drawing
from piip.digit_demo.drawing import draw_classified, draw_curves, draw_predictions, read_metrics


def _entry(category: int, box: tuple[int, int, int, int], score: float | None = None, image_id: int = 1) -> dict:
    x, y, width, height = box
    mask = np.zeros((48, 48), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(mask)
    entry = {
        "image_id": image_id,
        "category_id": category,
        "bbox": list(box),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }
    return entry if score is None else {**entry, "score": score}


def test_metrics_of_a_resumed_run_keep_the_last_value(tmp_path):
    lines = [
        {"iteration": 9, "total_loss": 3.0},
        {"iteration": 19, "total_loss": 2.0, "bbox/AP": 10.0},
        {"iteration": 19, "total_loss": 1.5},
        {"iteration": 29, "bbox/AP": 20.0},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_metrics(path)
    assert set(curves) == {"total_loss", "bbox/AP"}
    assert curves["total_loss"] == ([9, 19], [3.0, 1.5])
    assert curves["bbox/AP"] == ([19, 29], [10.0, 20.0])


@pytest.mark.parametrize(
    ("predicted", "result"),
    [
        ([], 0),
        ([_entry(3, (4, 4, 20, 20), 0.9)], 1),
        ([_entry(4, (4, 4, 20, 20), 0.9)], 0),  # another class
        ([_entry(3, (4, 4, 20, 9), 0.9)], 0),  # IoU 0.45
        ([_entry(3, (4, 4, 20, 10), 0.9)], 1),  # IoU 0.5
        ([_entry(3, (4, 4, 20, 20), 0.9), _entry(3, (4, 4, 20, 19), 0.8)], 1),  # found twice
    ],
)
def test_matches_need_class_and_overlap_and_count_once(predicted, result):
    assert drawing._count_matches([_entry(3, (4, 4, 20, 20))], predicted) == result


def test_predictions_are_drawn_beside_the_ground_truth(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((48, 48, 3), 127, dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "0"}],
        "annotations": [_entry(1, (4, 4, 30, 30))],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    drawn = {}
    for name, score in (("none", None), ("weak", 0.4), ("sure", 0.9)):
        results = [] if score is None else [_entry(1, (4, 4, 30, 30), score)]
        (tmp_path / "results.json").write_text(json.dumps(results))
        path = tmp_path / "out" / f"{name}.png"
        draw_predictions(path, "title", tmp_path / "truth.json", tmp_path / "images", tmp_path / "results.json")
        drawn[name] = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.array_equal(drawn["none"], drawn["weak"])
    # Below the headline, a sure prediction changes the right half only.
    changed = np.abs(drawn["sure"] - drawn["none"]).max(axis=(0, 2)) > 30
    half = len(changed) // 2
    assert changed[half:].any() and not changed[: half - 5].any()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["none.png", "sure.png", "weak.png"]


def test_all_other_drawings_are_written_whole(tmp_path):
    losses, scores = {"a": ([0, 10], [2.0, 1.0])}, {"AP": ([10], [50.0])}
    draw_curves(tmp_path / "curves.png", "title", losses, scores, "AP")
    draw_classified(tmp_path / "classified.png", "title", np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 2], [0, 1, 1])
    for name in ("curves", "classified"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 100
    assert not list(tmp_path.glob(".*"))
