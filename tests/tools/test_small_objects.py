"""tools/small_objects.py: what it compares, its scores and its table; no training."""

import json
import statistics

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("sahi", reason='needs pip install "piip[tiles]"')

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from piip_tools import claim


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("small_objects")


@pytest.fixture
def scenes(tool, tmp_path, monkeypatch):
    """Folder with two scenes of each part, and their tiles."""
    monkeypatch.setattr(tool.claim, "_pretrain", lambda *args: None)
    claim.prepare(tmp_path, tool.SCENES, {"num_train": 2, "num_val": 2})
    tool._cut_tiles(tmp_path)
    return tmp_path


def test_one_pass_and_tiles_cost_the_same(tool, tmp_path):
    counts = {}
    for way in tool.WAYS[:3]:
        cfg = tool.model_config(way, tmp_path)
        cfg.model.backbone.bottom_up.pretrained, cfg.data.num_classes = False, 1
        model, side = instantiate(cfg.model).eval(), way.backbone.image_size
        image = [{"image": torch.rand(3, side, side) * 255, "height": side, "width": side}]
        counts[way.title] = tool.executed_macs(lambda model=model, image=image: model(image)) * (4 if way.tiles else 1)
    median = statistics.median(counts.values())
    assert {title: n for title, n in counts.items() if abs(n / median - 1) > tool.TOLERANCE} == {}


def test_tiles_are_trained_on_as_scenes_are(tool, scenes):
    one_pass, tiles = (tool.model_config(way, scenes) for way in tool.WAYS[1:3])
    assert tiles.dataloader.train.total_batch_size == 4 * one_pass.dataloader.train.total_batch_size
    anchors = [  # in pixels of the scene
        np.ravel(cfg.model.proposal_generator.anchor_generator.sizes) * seen / cfg.data.train.scales[0][0]
        for cfg, seen in ((one_pass, tool.SCENES.image_size), (tiles, tool.TILE))
    ]
    np.testing.assert_allclose(*anchors)
    content = json.loads((scenes / "tiles/train/train_coco.json").read_text())
    assert len(content["images"]) == 2 * 4
    assert tiles.data.train.annotations == str(scenes / "tiles/train/train_coco.json")
    for image in content["images"]:
        assert Image.open(scenes / "tiles/train" / image["file_name"]).size == (tool.TILE, tool.TILE)


class _Named:
    """As much of a predictor as `score` needs."""

    def to_coco(self, instances, image_id):
        boxes = instances.pred_boxes.tensor.numpy()
        boxes = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).tolist()
        pairs = zip(boxes, instances.scores.tolist(), strict=True)
        return [{"image_id": image_id, "category_id": 1, "bbox": box, "score": score} for box, score in pairs]


def test_scores_are_those_of_what_is_found(tool, scenes):
    truth = COCO(str(scenes / "val.json"))
    found = {}
    for key, digits in truth.imgToAnns.items():
        boxes = torch.tensor([digit["bbox"] for digit in digits], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        areas = torch.tensor([digit["area"] for digit in digits])
        found[key] = Instances((256, 256), pred_boxes=Boxes(boxes), scores=torch.ones(len(digits)))[areas < 32**2]
    scores = tool.score(_Named(), found, truth)
    assert (scores["APs"], scores["APm"]) == (pytest.approx(100), 0)
    small = np.mean([digit["area"] < 32**2 for digit in truth.anns.values()])
    assert scores["AP"] == pytest.approx(100 * small, abs=1)  # at 101 recalls
    measured = {way: tool.Measured(0.7, 50.0, 10.0, [scores, scores]) for way in tool.WAYS}
    line = tool.table(measured).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:7]] == [
        *("pyramid, one pass", "76/52/28", "0.70", "50", "10.0", "100.0 ± 0.0")
    ]
    tool.draw_costs(measured).savefig(scenes / "costs.png")
    tool.draw_scene(scenes, dict.fromkeys(tool.WAYS[:3], found[1])).savefig(scenes / "scene.png")
    assert Image.open(scenes / "scene.png").size == (432, 453)
