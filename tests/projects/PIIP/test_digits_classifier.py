"""The demo's classifier of digits, and the demo's other models that start from it."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate
from PIL import Image

from piip.checkpointer import AtomicCheckpointer
from piip.lazy_config import follow_annotations, load_config

CONFIGS = Path(__file__).parents[3] / "projects" / "PIIP" / "configs" / "demo"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Model and configuration on noise of ten classes."""
    root, rng = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / "0.png")
    overrides = [f"data.train.images={root}/train", f"data.test.images={root}/val"]
    overrides.append("dataloader.train.total_batch_size=4")
    config = load_config(str(CONFIGS / "piip_digits_classifier.py"), overrides)
    follow_annotations(config, training=True)
    torch.manual_seed(0)
    return instantiate(config.model), config


def test_it_trains_on_turned_digits_and_is_tested_on_them_as_they_are(classifier):
    model, config = classifier
    batch = next(iter(instantiate(config.dataloader.train)))
    assert all(entry["image"].shape == (3, 64, 64) and entry["image"].dtype == torch.uint8 for entry in batch)
    loss = model.train()(batch)["loss_cls"]
    loss.backward()
    assert abs(loss.item() - np.log(10)) < 1
    assert all(p.grad.any() for p in model.pyramid.branches.parameters())
    (entry, *_), model = next(iter(instantiate(config.dataloader.test))), model.eval()
    stored = np.asarray(Image.open(entry["file_name"]))
    assert (entry["image"].numpy() == stored).all()
    assert model([entry])[0]["scores"].shape == (10,)


@pytest.mark.parametrize("name", ["mask_rcnn", "dino", "upernet"])
def test_its_weights_start_the_models_of_the_scenes(classifier, name, tmp_path):
    model, _ = classifier
    AtomicCheckpointer(model, str(tmp_path)).save("digits")
    other = instantiate(load_config(str(CONFIGS / f"piip_digits_{name}.py"), []).model)
    AtomicCheckpointer(other).load(str(tmp_path / "digits.pth"), checkpointables=[])
    bottom = other.backbone.bottom_up if name == "mask_rcnn" else other.backbone
    pyramid = bottom.features.pyramid.eval()
    state = model.pyramid.state_dict()
    for key, tensor in pyramid.state_dict().items():
        if not key.endswith("pos_embed"):  # resized to the scenes
            assert torch.equal(tensor, state[key]), key
    assert [branch.model.pos_embed.shape[1] for branch in pyramid.branches] == [12**2, 18**2, 24**2]
