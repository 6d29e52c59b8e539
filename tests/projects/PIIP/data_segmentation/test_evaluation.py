"""The evaluator on numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from PIL import Image

from piip.data.segmentation import build_sem_seg_evaluator, find_pairs

# Values in the files, with 0 to ignore and 1, 2, 3 for the classes; predictions count from 0
LABELS = [[[1, 1, 2], [1, 0, 2]], [[2, 2, 2], [0, 1, 1]]]
PREDICTED = [[[0, 1, 1], [0, 2, 1]], [[1, 1, 0], [2, 0, 0]]]
# Without the ignored pixels: class 0 is seen in 5, predicted in 5, both in 4; class 1 in 5, in 5, in 4; class 2 never
EXPECTED = {"mIoU": 100 * 4 / 6, "mACC": 80.0, "pACC": 80.0, "fwIoU": 100 * 4 / 6}


@pytest.fixture
def folders(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for index, labels in enumerate(LABELS):
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / f"{index}.jpg")
        Image.fromarray(np.array(labels, dtype=np.uint8)).save(tmp_path / "labels" / f"{index}.png")
    return str(tmp_path / "images"), str(tmp_path / "labels")


def _evaluate(folders, predicted, classes, reduce_zero_label, **kwargs):
    evaluator = build_sem_seg_evaluator(*folders, classes=classes, reduce_zero_label=reduce_zero_label, **kwargs)
    evaluator.reset()
    for pair, values in zip(find_pairs(*folders), predicted, strict=True):
        logits = torch.nn.functional.one_hot(torch.tensor(values), len(classes)).permute(2, 0, 1)
        evaluator.process([{"file_name": pair.image}], [{"sem_seg": logits}])
    return evaluator.evaluate()["sem_seg"]


def test_scores_are_those_worked_out_by_hand(folders, tmp_path):
    scores = _evaluate(folders, PREDICTED, ["a", "b", "c"], True, output_dir=str(tmp_path / "results"))
    assert {name: scores[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert scores["IoU-a"] == scores["IoU-b"] == pytest.approx(100 * 4 / 6)
    assert np.isnan(scores["IoU-c"])
    written = json.loads((tmp_path / "results" / "sem_seg_predictions.json").read_text())
    assert {entry["category_id"] for entry in written} == {1, 2, 3}  # as in the files


def test_the_same_folders_with_other_classes_are_read_anew(folders):
    assert _evaluate(folders, PREDICTED, ["a", "b", "c"], True)["mIoU"] == pytest.approx(100 * 4 / 6)
    perfect = _evaluate(folders, LABELS, ["nothing", "a", "b"], False)
    assert perfect["mIoU"] == perfect["IoU-nothing"] == 100.0


def test_masks_of_0_and_255_do_not_pass_for_a_perfect_model(folders, caplog):
    for path in Path(folders[1]).iterdir():
        Image.fromarray(np.array([[0, 0, 255], [0, 0, 255]], dtype=np.uint8)).save(path)
    scores = _evaluate(folders, np.zeros((2, 2, 3), dtype=int), ["background", "object"], False)
    assert scores["mIoU"] == 100.0 and scores["classes in mIoU"] == 1
    assert "mIoU is the mean over 1 of 2 classes: class 'object' occurs in no label map; 255 = ignored" in caplog.text
    caplog.clear()
    assert _evaluate(folders, np.zeros((2, 2, 3), dtype=int), ["background"], False)["classes in mIoU"] == 1
    assert "is the mean over" not in caplog.text
