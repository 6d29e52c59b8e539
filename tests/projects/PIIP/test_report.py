"""The report of a run: against COCO's own numbers, and cases whose errors are known."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image
from pycocotools.coco import COCO

from piip.charts import draw_confusion
from piip.data import CheckedDatasetMapper, build_coco_evaluator, build_train_loader, get_coco_dicts
from piip.data.coco import GROUND_TRUTH
from piip.hooks import BestModel
from piip.report import RunReport, write_report
from piip.report_results import (
    best_threshold,
    count_confusions,
    detection_sections,
    evaluate_coco,
    label_map_sections,
    match_objects,
)
from piip.tracking import trackers
from piip_core.errors import ConfigError

# Two images of 200 x 100 pixels; classes a, b and one that no object has
_BOXES = [(1, 10, [10, 10, 40, 40]), (1, 20, [100, 10, 40, 40]), (1, 10, [150, 60, 20, 20]), (2, 10, [10, 10, 40, 40])]
_FOUND = [
    (1, 10, [10, 10, 40, 40], 0.9),  # found
    (1, 20, [12, 10, 40, 40], 0.8),  # the same object again
    (1, 10, [100, 12, 40, 40], 0.7),  # the second object, with another class
    (1, 20, [60, 60, 20, 20], 0.6),  # nothing there
    (2, 10, [30, 30, 40, 40], 0.95),  # overlaps by too little, so that the object is missed
    (2, 30, [180, 80, 10, 10], 0.1),  # below the threshold
]


def _truth(crowd: bool = False) -> dict:
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (image, category, box) in enumerate(_BOXES, start=1)
    ]
    if crowd:
        box = [50, 50, 50, 50]
        crowd_of = {"image_id": 1, "category_id": 20, "bbox": box, "area": 2500, "iscrowd": 1}
        annotations.append({"id": len(annotations) + 1, **crowd_of})
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 200, "height": 100} for k in (1, 2)],
        "categories": [{"id": 10 * k, "name": name} for k, name in enumerate("abc", start=1)],
        "annotations": annotations,
    }


def _results(found=_FOUND) -> list[dict]:
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, entry, strict=True)) for entry in found]


def _api(data: dict) -> COCO:
    api = COCO()
    api.dataset = data
    api.createIndex()
    return api


@pytest.mark.parametrize(("crowd", "background"), [(False, 2), (True, 1)])
def test_every_object_and_detection_is_judged(crowd, background):
    """Against the comments above; what lies in a crowd is no error."""
    matches = match_objects(_api(_truth(crowd)), [entry for entry in _results() if entry["score"] > 0.5], "bbox")
    kinds = [match.kind for image in (1, 2) for match in matches[image]]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "found": 1,
        "duplicate": 1,
        "wrong class": 1,
        "background": background,
        "missed": 2,
    }
    matrix = count_confusions((match for image in matches.values() for match in image), 3)
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 0], expected[1, 0], expected[0, 3] = 1, 1, 2
    expected[3, 0], expected[3, 1] = 1, background
    assert matrix.tolist() == expected.tolist()
    assert matrix[:3].sum() == len(_BOXES)


def test_the_threshold_is_that_of_the_best_f1():
    """A class whose three objects have scores 0.9, 0.8 and 0.5, below which there are ten mistakes of 0.3."""
    boxes = [[0, 0, 10, 10], [50, 0, 10, 10], [100, 0, 10, 10]]
    data = _truth() | {"annotations": []}
    for number, box in enumerate(boxes, start=1):
        entry = {"id": number, "image_id": 1, "category_id": 10, "bbox": box, "area": 100, "iscrowd": 0}
        data["annotations"].append(entry)
    found = [(1, 10, box, score) for box, score in zip(boxes, (0.9, 0.8, 0.5), strict=True)]
    found += [(1, 10, [5 * k, 80, 10, 10], 0.3) for k in range(10)] + [(1, 10, [0, 40, 10, 10], 0.62)]
    # F1 is 4 / 5 down to 0.65, 4 / 6 down to 0.55, 6 / 7 down to 0.35 and 6 / 17 from there
    assert best_threshold(evaluate_coco(_api(data), _results(found), "bbox", iou=0.5)) == 0.35


@pytest.fixture
def evaluated(tmp_path) -> tuple[Path, dict]:
    """A folder with the files and the scores of Detectron2's evaluator, for the boxes above."""
    (tmp_path / "images").mkdir()
    for k in (1, 2):
        Image.fromarray(np.full((100, 200, 3), 60 * k, dtype=np.uint8)).save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "truth.json").write_text(json.dumps(_truth()))
    evaluator = build_coco_evaluator(str(tmp_path / "truth.json"), output_dir=str(tmp_path / "inference"))
    evaluator.reset()
    for image in (1, 2):
        found = [entry for entry in _FOUND if entry[0] == image]
        boxes = torch.tensor([[x, y, x + w, y + h] for _, _, (x, y, w, h), _ in found], dtype=torch.float32)
        instances = Instances((100, 200), pred_boxes=Boxes(boxes))
        instances.scores = torch.tensor([score for *_, score in found])
        instances.pred_classes = torch.tensor([category // 10 - 1 for _, category, *_ in found])
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return tmp_path, evaluator.evaluate()["bbox"]


def _config(folder: Path, **train: object):
    data = {"kind": "coco", "train": {}, "test": {"images": str(folder / "images")}}
    evaluator = {"evaluator": {"require_masks": False}, "train": {"mapper": {"image_format": "RGB"}}}
    return OmegaConf.create({"data": data, "dataloader": evaluator, "train": {"output_dir": str(folder), **train}})


def test_tables_equal_the_evaluator(evaluated):
    folder, scores = evaluated
    sections = {s.title: s for s in detection_sections(_config(folder), folder / "inference", folder / "report")}
    classes = {row[0]: row[1:] for row in sections["Classes"].rows[1:]}
    assert {name: float(row[1]) for name, row in classes.items() if name != "c"} == {
        name: pytest.approx(scores[f"AP-{name}"], abs=0.05) for name in "ab"
    }
    assert classes["c"] == ("0", "–", "–", "–", "–")
    sizes = sections["Sizes of objects"].rows[1:]
    assert [row[1] for row in sizes] == ["4", "1", "3", "0"]
    for row, name in zip(sizes, ("AP", "APs", "APm"), strict=False):
        assert float(row[2]) == pytest.approx(scores[name], abs=0.05)
    assert sizes[3][2] == "–"


def test_the_page_has_all_its_pictures_in_it(evaluated):
    folder, scores = evaluated
    lines = [{"iteration": k, "total_loss": 2.0 - k / 10, "lr": 0.1, "bbox/AP": 1.0 * k} for k in (1, 2)]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flat = {f"bbox/{name}": value for name, value in scores.items()}
    records = get_coco_dicts(str(folder / "truth.json"), str(folder / "images"))
    mapper = CheckedDatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    loader = build_train_loader(records, mapper=mapper, total_batch_size=1)
    page = write_report(_config(folder), folder, flat, loader=loader).read_text()
    pictures = re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img") == 6  # curves, classes, precision, confusions, worst, augmentation
    for _, content in pictures:
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            picture.load()
            assert 200 < picture.width < 1300
    assert "http" not in page and "<script" not in page
    assert f"{scores['AP']:.1f}" in page
    assert "nan" not in re.sub('base64,[^"]+', "", page).lower()
    # Later on curves alone are new
    (folder / "inference" / GROUND_TRUTH).unlink()
    assert write_report(_config(folder), folder).read_text() == page


def test_what_is_missing_is_said(evaluated):
    folder, _ = evaluated
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    sections = {s.title: s for s in detection_sections(_config(folder), folder / "inference", folder / "report")}
    assert sections["Worst images"].rows[1] == ("0", "4", "0", "0", "0")
    assert [row[2] for row in sections["Classes"].rows[1:]] == ["0.0", "0.0", "–"]
    data = {**_truth(), "annotations": []}
    (folder / "inference" / GROUND_TRUTH).write_text(json.dumps(data))
    (section,) = detection_sections(_config(folder), folder / "inference", folder / "report")
    assert "2 validation images have no objects" in section.text


@pytest.mark.parametrize("classes", [3, 82])
def test_confusions_of_many_classes_stay_legible(tmp_path, classes):
    matrix = np.diag(np.arange(classes)) + np.eye(classes, k=1, dtype=int)
    left_out = draw_confusion(
        tmp_path / "a.png", matrix, [f"a class with a very long name {k}" for k in range(classes)]
    )
    assert bool(left_out) == (classes > 81)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 18 * min(classes, 80)  # pixels of a row


def test_pixels_are_counted_as_the_evaluator_counts(tmp_path):
    from piip.data.segmentation import build_sem_seg_evaluator

    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    truth = rng.integers(0, 3, (2, 20, 30), dtype=np.uint8)
    truth[:, :4] = 255
    for k, labels in enumerate(truth):
        Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{k}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{k}.png")
    places = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")}
    evaluator = build_sem_seg_evaluator(**places, classes=list("abcd"), output_dir=str(tmp_path / "inference"))
    evaluator.reset()
    for k in range(2):
        predicted = torch.as_tensor(np.where(rng.random((20, 30)) < 0.3 + k / 3, truth[k] % 4, 1).astype(np.int64))
        scores = torch.nn.functional.one_hot(predicted, 4).permute(2, 0, 1)
        evaluator.process([{"file_name": str(tmp_path / "images" / f"{k}.png")}], [{"sem_seg": scores}])
    expected = evaluator.evaluate()["sem_seg"]
    cfg = OmegaConf.create({"data": {"classes": list("abcd")}})
    sections = {s.title: s for s in label_map_sections(cfg, tmp_path / "inference", tmp_path / "report")}
    rows = dict(sections["Classes"].rows[1:])
    assert rows.pop("d") == "–"
    assert {name: float(value) for name, value in rows.items()} == {
        name: pytest.approx(expected[f"IoU-{name}"], abs=0.05) for name in "abc"
    }


def test_the_report_is_of_the_best_evaluation(evaluated, monkeypatch, caplog):
    """Of three, the second; and what goes wrong with a report does not end a training."""
    folder, _ = evaluated
    written = []
    monkeypatch.setattr("piip.report.write_report", lambda cfg, folder, scores, loader: written.append(scores))
    best = BestModel(torch.nn.Linear(1, 1), str(folder), {}, period=1, metric="bbox/AP")
    hook = RunReport(_config(folder), None, best)
    with EventStorage() as storage:
        for iteration, value in enumerate((1.0, 3.0, 2.0)):
            storage.iter = iteration
            storage.put_scalars(**{"bbox/AP": value, "rpn/num": 1.0})
            trainer = SimpleNamespace(iter=iteration, max_iter=3, storage=storage, start_iter=0)
            best.trainer = hook.trainer = trainer
            if iteration < 2:
                best.after_step()
                hook.after_step()
        trainer.iter = storage.iter = 3
        best.after_train()
        hook.after_train()
        assert written == [{"bbox/AP": 1.0}, {"bbox/AP": 3.0}, None]
        monkeypatch.setattr("piip.report.write_report", lambda *_, **__: 1 / 0)
        hook.after_train()
    assert "The report could not be written" in caplog.text


class _Tracker:
    """Stands for both packages, as far as they are used; keeps what was sent by the id of the run."""

    def __init__(self) -> None:
        self.sent, self.ended = {}, 0

    def init(self, *, id, config, **_):
        self.run = id or f"run{len(self.sent)}"
        self.sent.setdefault(self.run, [])
        return SimpleNamespace(id=self.run, log=self.log_metrics, finish=self.end_run)

    def start_run(self, *, run_id, run_name):
        run = self.init(id=run_id, config=None)
        return SimpleNamespace(info=SimpleNamespace(run_id=run.id))

    def log_params(self, settings):
        self.settings = settings

    def log_metrics(self, scalars, step):
        self.sent[self.run].append((step, dict(scalars)))

    def end_run(self):
        self.ended += 1


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_curves_go_to_a_tracker_and_a_resumed_run_goes_on(package, tmp_path, monkeypatch):
    tracker = _Tracker()
    monkeypatch.setitem(sys.modules, package, tracker)
    cfg = _config(tmp_path, track=package)
    for start in (0, 2):
        (writer,) = trackers(cfg)
        with EventStorage(start) as storage:
            for step in (start, start + 1):
                storage.iter = step
                storage.put_scalar("min(a, b)", float(step))
                writer.write()
        writer.close()
    name = "min(a, b)" if package == "wandb" else "min_a_ b_"
    assert [step for step, _ in tracker.sent["run0"]] == [0, 1, 2, 3]
    assert all(list(scalars) == [name] for _, scalars in tracker.sent["run0"])
    assert tracker.ended == 2


def test_a_tracker_has_to_be_known_and_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'pip install "piip\[wandb\]"'):
        trackers(_config(tmp_path, track="wandb"))
    with pytest.raises(ConfigError, match=r"train.track='comet': expected one of 'tensorboard'"):
        trackers(_config(tmp_path, track="comet"))
    assert trackers(_config(tmp_path, track="tensorboard")) == []
