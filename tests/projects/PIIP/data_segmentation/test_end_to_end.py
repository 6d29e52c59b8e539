"""Own folders of images and label maps: trained, evaluated, predicted and drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

from PIL import Image

from piip.data import read_image
from piip.demo import run_demo
from piip.lazy_config import load_config
from piip.predict import Predictor
from piip.train import main

CONFIG = str(Path(__file__).parents[1] / "tiny_upernet.py")


def arguments(files, output, *opts, **given):
    options = {"resume": False, "eval_only": False, **given}
    opts = [f"train.output_dir={output}", *files.overrides("train", "test"), *opts]
    return argparse.Namespace(config_file=CONFIG, opts=opts, **options)


def mean_iou(confusion: np.ndarray) -> float:
    shared = np.diag(confusion)
    return float(100 * np.mean(shared / (confusion.sum(0) + confusion.sum(1) - shared)))


def test_training_evaluation_prediction_and_pictures(files, tmp_path):
    output = tmp_path / "run"
    main(arguments(files, output))
    weights = str(output / "model_final.pth")
    # The configuration of a prediction knows nothing of the data set; the checkpoint does
    predictor = Predictor(load_config(CONFIG), weights)
    assert predictor.task == "segmentation" and predictor.metadata.stuff_classes == ["ground", "disc", "bar"]
    with pytest.raises(ValueError, match=r"is for segmentation: call predictor\.segment\(image\)"):
        predictor(np.zeros((8, 8, 3), dtype=np.uint8))

    confusion = np.zeros((3, 3))
    for path in sorted(files.images.iterdir()):
        truth = np.asarray(Image.open(files.labels / path.name))
        found = predictor.segment(read_image(str(path)))
        assert found.shape == truth.shape
        np.add.at(confusion, (truth[truth != 255], found[truth != 255]), 1)
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    evaluated = [line["sem_seg/mIoU"] for line in metrics if "sem_seg/mIoU" in line]
    assert evaluated == [pytest.approx(mean_iou(confusion), abs=1e-6)]

    assert run_demo(predictor, [str(files.images)], str(tmp_path / "pictures")) == []
    results = json.loads((tmp_path / "pictures" / "predictions.json").read_text())
    for image_id, path in enumerate(sorted(files.images.iterdir()), 1):
        found = predictor.segment(read_image(str(path)))
        with Image.open(tmp_path / "pictures" / f"{path.stem}_labels.png") as written:
            assert np.array_equal(np.asarray(written), found)
        with Image.open(tmp_path / "pictures" / f"{path.stem}.jpg") as picture:
            assert picture.size == found.shape[::-1]
        shares = {r["category_id"]: r["share"] for r in results if r["image_id"] == image_id}
        assert shares == {k: pytest.approx((found == k).mean()) for k in np.unique(found)}


def test_written_label_maps_have_the_values_of_the_data_sets_own(files, tmp_path):
    output = tmp_path / "run"
    for path in files.labels.iterdir():  # ADE20K's way: 0 to ignore, class k is k + 1
        labels = np.asarray(Image.open(path)) + np.uint8(1)
        Image.fromarray(labels).save(path)
    main(arguments(files, output, "data.reduce_zero_label=True"))
    predictor = Predictor(load_config(CONFIG), str(output / "model_final.pth"))
    run_demo(predictor, [str(files.images / "1.png")], str(tmp_path / "pictures"))
    written = np.asarray(Image.open(tmp_path / "pictures" / "1_labels.png"))
    assert np.array_equal(written, predictor.segment(read_image(str(files.images / "1.png"))) + 1)
