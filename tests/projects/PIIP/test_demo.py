"""`Predictor` and the demo: the same detections as in evaluation, and files that can be used."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import av
import torch
from detectron2.config import instantiate
from PIL import Image
from pycocotools.coco import COCO

from piip.data import read_image
from piip.demo import collect_inputs, run_demo
from piip.lazy_config import load_config
from piip.predict import Predictor
from piip.train import main
from piip_core.errors import UserError


@pytest.fixture(scope="module")
def run(tiny_config, shared_coco, tmp_path_factory) -> Path:
    """An evaluated two-iteration run: hardly trained, so that it detects plenty."""
    output = tmp_path_factory.mktemp("run")
    opts = [f"train.output_dir={output}", "train.max_iter=2", *shared_coco.overrides("train", "test")]
    main(argparse.Namespace(config_file=tiny_config, resume=False, eval_only=False, opts=opts))
    return output


@pytest.fixture
def predictor(tiny_config, run) -> Predictor:
    # The configuration knows nothing of the data set; the checkpoint does
    return Predictor(load_config(tiny_config), str(run / "model_final.pth"))


def test_detections_equal_those_of_the_evaluation(predictor, run, shared_coco):
    expected = json.loads((run / "inference" / "coco_instances_results.json").read_text())
    assert len(expected) > 20
    found = []
    for image in shared_coco.read()["images"]:
        instances = predictor(read_image(str(shared_coco.images / image["file_name"])))
        found += predictor.to_coco(instances, image["id"])
    names = {3: "square", 17: "bar", 40: "disc"}
    assert [result.pop("category_name") for result in found] == [names[e["category_id"]] for e in expected]
    assert found == expected


def test_prepared_model_needs_a_piip(predictor, tiny_config, run, shared_coco):
    with pytest.raises(UserError, match="expected a model with a PIIP inside, got a GeneralizedRCNN"):
        Predictor(load_config(tiny_config), str(run / "model_final.pth"), prepare=True)


def test_threshold_and_wrong_calls(predictor, shared_coco):
    image = read_image(str(shared_coco.images / "001.png"))
    found = predictor(image)
    middle = float(found.scores.median())
    assert len(predictor(image, min_score=middle)) == int((found.scores >= middle).sum()) < len(found)
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        predictor(image.astype(np.float32))
    with pytest.raises(ValueError, match=r"is for detection: call predictor\(image\)"):
        predictor.classify(image)


def test_class_names_come_from_checkpoint_annotations_or_detectron2(predictor, tiny_config, run, shared_coco, tmp_path):
    assert predictor.metadata.thing_classes == ["square", "bar", "disc"]
    weights = str(tmp_path / "bare.pth")
    torch.save({"model": predictor.model.state_dict()}, weights)
    known = Predictor(load_config(tiny_config, shared_coco.overrides("test")), weights)
    assert known.categories == predictor.categories
    given = Predictor(load_config(tiny_config, ["data.num_classes=3"]), weights, class_names=["a", "b", "c"])
    assert [(c.id, c.name) for c in given.categories] == [(1, "a"), (2, "b"), (3, "c")]
    unknown = Predictor(load_config(tiny_config, ["data.num_classes=3"]), weights)
    assert (unknown.categories, unknown.category(2).name) == ((), "class 2")

    cfg = load_config(tiny_config)
    torch.save({"model": instantiate(cfg.model).state_dict()}, weights)
    coco = Predictor(cfg, weights)
    assert (len(coco.categories), coco.category(79).id, coco.category(79).name) == (80, 90, "toothbrush")


def _video(path: Path, files: list[Path]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for file in files:
            image = np.asarray(Image.open(file).resize((160, 120)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_images_folders_and_videos_become_pictures_and_json(predictor, shared_coco, tmp_path):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for name in ("001.png", "002.png"):
        shutil.copy(shared_coco.images / name, folder)
    (folder / "notes.txt").write_text("not an image, not asked for")
    Image.open(folder / "001.png").save(folder / "001.jpg")
    (folder / "broken.jpg").write_bytes(b"")
    _video(tmp_path / "clip.mp4", sorted(shared_coco.images.iterdir())[:3])
    output = tmp_path / "out"

    inputs = [str(tmp_path / "in"), str(tmp_path / "clip.mp4"), str(shared_coco.images / "003.png")]
    errors = run_demo(predictor, inputs, str(output), min_score=0.0)

    assert len(errors) == 1
    assert "broken.jpg: the file is empty" in errors[0]
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {"deep/001.jpg", "deep/001_2.jpg", "deep/002.jpg", "003.jpg", "clip.mp4", "predictions.json"}
    assert Image.open(output / "deep" / "002.jpg").size == Image.open(folder / "002.png").size
    with av.open(str(output / "clip.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(120, 160, 3)] * 3

    results = json.loads((output / "predictions.json").read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3, 4, 5, 6, 7}
    assert {Path(r["file_name"]).name for r in results} == {"001.jpg", "001.png", "002.png", "clip.mp4", "003.png"}
    truth = COCO(str(shared_coco.annotations))
    truth.dataset["images"].append({"id": 7, "width": 160, "height": 120, "file_name": "x"})
    truth.createIndex()
    loaded = truth.loadRes(str(output / "predictions.json"))
    assert len(loaded.anns) == len(results) > 0


def test_an_interrupted_video_leaves_the_old_one(predictor, shared_coco, tmp_path, monkeypatch):
    """After 100 frames: an encoder writes nothing of the first ones."""
    _video(tmp_path / "clip.mp4", sorted(shared_coco.images.iterdir())[:1] * 101)
    output = tmp_path / "out"
    output.mkdir()
    (output / "clip.mp4").write_bytes(b"the old one")
    nothing = predictor(np.zeros((120, 160, 3), np.uint8), min_score=1.0)
    frames = iter([nothing] * 100)

    def interrupted(self, image, **options):
        for found in frames:
            return found
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(predictor, [str(tmp_path / "clip.mp4")], str(output), min_score=0.0)
    assert [(path.name, path.read_bytes()) for path in output.iterdir()] == [("clip.mp4", b"the old one")]


def test_inputs_that_cannot_be_shown_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.jpg: no such file or folder"):
        collect_inputs([str(tmp_path / "gone.jpg")], "out")
    with pytest.raises(UserError, match="no image file in this folder"):
        collect_inputs([str(tmp_path)], "out")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=r"a.txt: neither an image nor a video"):
        collect_inputs([str(tmp_path / "a.txt")], "out")


def test_results_never_replace_an_input(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for inputs, output in ((tmp_path / "a.jpg", tmp_path), (tmp_path, tmp_path / "link")):
        with pytest.raises(UserError, match=r"would replace .*a\.jpg"):
            collect_inputs([str(inputs)], str(output))


def test_the_command(tiny_config, run, shared_coco, tmp_path, load_tool, monkeypatch):
    (tmp_path / "bad.png").write_bytes((shared_coco.images / "001.png").read_bytes()[:500])
    arguments = ["--config-file", tiny_config, "--checkpoint", str(run / "model_final.pth")]
    arguments += ["--input", str(shared_coco.images / "001.png"), str(tmp_path / "bad.png")]
    arguments += ["--output", str(tmp_path / "out"), "--confidence-threshold", "0.1", "--opts", "train.device=cpu"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path / 'bad.png'}: cannot be decoded"):
        load_tool("demo").main()
    assert (tmp_path / "out" / "001.jpg").is_file()
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())
