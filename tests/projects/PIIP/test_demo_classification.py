"""Classifiers in the demo: the scores of the plain model, names from where they are, pictures that can be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from PIL import Image
from timm.data import create_transform

from piip.demo import draw_bars, run_demo
from piip.lazy_config import load_config
from piip.predict import Predictor
from piip_core import PIIPClassifier, zoo
from piip_core.checkpoints import PublishedNames, convert_file, to_published
from piip_core.errors import ConfigError

CONFIG = str(Path(__file__).with_name("tiny_classifier.py"))
NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


def tiny(*opts: str, num_classes: int = len(NAMES)):
    return load_config(CONFIG, [f"data.num_classes={num_classes}", *opts])


@pytest.fixture(scope="module")
def model(randomize) -> PIIPClassifier:
    """A classifier whose scores differ, without Detectron2 around it."""
    torch.manual_seed(0)
    return randomize(PIIPClassifier(instantiate(tiny().model.config))).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    """A checkpoint as training writes it."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    torch.save({"model": model.state_dict(), "categories": categories}, path)
    return str(path)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 44, 3), dtype=np.uint8)


def expected(model: PIIPClassifier, image: np.ndarray) -> torch.Tensor:
    """With timm's own evaluation transform."""
    transform = create_transform(32, interpolation="bicubic", crop_pct=1.0)
    with torch.no_grad():
        return model(transform(Image.fromarray(image))[None])[0].softmax(0)


def test_the_best_classes_are_those_of_the_plain_model(model, weights, image):
    predictor = Predictor(tiny(num_classes=3), weights)  # the checkpoint says how many
    found, scores = predictor.classify(image), expected(model, image)
    assert [index for index, _ in found] == scores.argsort(descending=True)[:5].tolist()
    assert [score for _, score in found] == pytest.approx(scores.sort(descending=True).values[:5].tolist(), abs=1e-5)
    assert found[0][1] - found[1][1] > 1e-3
    assert len(predictor.classify(image, top=100)) == len(NAMES)
    with pytest.raises(ValueError, match=r"is for classification: call predictor\.classify\(image\)"):
        predictor(image)


def test_names_are_given_or_in_the_checkpoint_or_those_of_imagenet(model, weights, tmp_path, monkeypatch):
    assert [category.name for category in Predictor(tiny(), weights).categories] == list(NAMES)
    bare = str(tmp_path / "bare.pth")
    torch.save({"model": model.state_dict()}, bare)
    assert Predictor(tiny(), bare).category(6).name == "class 6"
    synsets = ["n02099601", *NAMES[1:]]  # what the folders of ImageNet are called
    given = Predictor(tiny(), bare, class_names=synsets).categories
    assert [(c.id, c.name) for c in given[:2]] == [(0, "golden retriever"), (1, "bee")]

    cfg = tiny(num_classes=1000)
    torch.save({"model": instantiate(cfg.model).state_dict()}, bare)
    names = [category.name for category in Predictor(cfg, bare).categories]
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[207] == "golden retriever"


def test_a_published_checkpoint_says_how_it_is_built(model, randomize, image, tmp_path, hub, monkeypatch):
    """Released classifiers have no position for a class token and read the first patch."""
    pyramid = model.config.pyramid
    branches = tuple(
        dataclasses.replace(branch, network=dataclasses.replace(branch.network, class_position=False))
        for branch in pyramid.branches
    )
    pyramid = dataclasses.replace(pyramid, branches=branches)
    config = dataclasses.replace(model.config, pyramid=pyramid, pooling="first_patch")
    published = randomize(PIIPClassifier(config)).eval()
    state, report = to_published(published.state_dict(), PublishedNames(config, ("deit", "deit")))
    assert report.complete
    torch.save({"model": state}, tmp_path / "released.pth")
    converted = tmp_path / "converted.safetensors"
    convert_file(tmp_path / "released.pth", converted, config=config)

    entry = dataclasses.replace(zoo.classification("piip_tsb_368_192_128"), name="piip_tiny", config=config)
    named = zoo.Released(entry=entry, repository="OpenGVLab/PIIP", file="classification/tiny.pth")
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, "piip_tiny", named)
    hub.release("piip_tiny", content=(tmp_path / "released.pth").read_bytes())
    for checkpoint in (str(converted), "piip_tiny"):
        predictor = Predictor(tiny(num_classes=1000), checkpoint)
        assert predictor.model.config == config != model.config
        found = dict(predictor.classify(image, top=100))
        assert [found[k] for k in range(7)] == pytest.approx(expected(published, image).tolist(), abs=1e-5)
    with pytest.raises(ConfigError, match=r"images of \[16, 32\] pixels, the configuration has one with \[16, 48\]"):
        Predictor(tiny("model.config.pyramid.branches.branch2.image_size=48"), str(converted))


def test_images_become_pictures_with_bars_and_json(weights, image, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in" / "small.png")
    large = np.kron(image, np.ones((10, 10, 1), dtype=np.uint8))
    Image.fromarray(large).save(tmp_path / "in" / "large.png")
    predictor, output = Predictor(tiny(), weights), tmp_path / "out"
    assert run_demo(predictor, [str(tmp_path / "in")], str(output)) == []
    assert {path.name for path in output.iterdir()} == {"small.jpg", "large.jpg", "predictions.json"}
    results = json.loads((output / "predictions.json").read_text())
    assert [result["image_id"] for result in results] == [k for k in (1, 2) for _ in range(5)]
    first = results[5:10]  # of small.png, the second name in the folder
    assert {Path(result["file_name"]).name for result in first} == {"small.png"}
    found = [(result["category_id"], result["score"]) for result in first]
    assert found == predictor.classify(image)
    assert all(result["category_name"] == NAMES[result["category_id"]] for result in results)


@pytest.mark.parametrize(("height", "width"), [(1000, 800), (24, 24), (500, 20)])
def test_bars_are_as_long_as_scores_and_beside_the_image(height, width):
    classes = (("a name", 0.5), ("a name that is much too long for the place there is for it, and then some", 0.25))
    picture = draw_bars(np.full((height, width, 3), (0, 128, 0), dtype=np.uint8), classes)
    shown = (picture == (0, 128, 0)).all(axis=2)
    rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
    assert len(rows) / len(columns) == pytest.approx(height / width, rel=0.1)
    bar = (picture == (31, 119, 180)).all(axis=2)  # the first colour of matplotlib
    assert np.flatnonzero(bar.any(axis=0))[0] > columns[-1]
    lengths = bar.sum(axis=1)[bar.any(axis=1)]
    assert lengths[0] == pytest.approx(2 * lengths[-1], abs=4)
