"""Entry points of torch.hub, loaded as torch.hub does."""

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from piip_core import DensePIIP, PIIPClassifier, zoo
from piip_core.checkpoints import our_names, to_published
from piip_core.errors import ConfigError
from piip_core.meta import on_meta

ROOT = str(Path(__file__).parents[2])


def test_classifiers():
    for entry in zoo.classification_entries():
        with on_meta():
            model = torch.hub.load(ROOT, entry.name, source="local", num_classes=7)
        assert isinstance(model, PIIPClassifier)
        assert model.config == dataclasses.replace(entry.training_config, num_classes=7)


def test_backbones():
    with on_meta():
        model = torch.hub.load(ROOT, "piip_backbone", "piip_tsb_1120_896_448", source="local")
    assert model.pyramid.config == zoo.get("piip_tsb_1120_896_448").config
    with pytest.raises(ConfigError, match="close matches are piip_tsb_1120_896_448"):
        torch.hub.load(ROOT, "piip_backbone", "piip_tsb_1120", source="local")


def test_a_released_backbone(hub, monkeypatch, tiny_model):
    config, file = tiny_model.pyramid.config, io.BytesIO()
    entry = dataclasses.replace(zoo.get("piip_tsb_1120_896_448"), name="piip_tiny", config=config)
    released = zoo.Released(entry=entry, repository="OpenGVLab/PIIP", file="detection/tiny.pth")
    monkeypatch.setitem(zoo._RELEASED_BY_NAME, "piip_tiny", released)
    state, report = to_published(tiny_model.state_dict(), our_names(config, list(tiny_model.state_dict())))
    report.check()
    torch.save({"state_dict": state}, file)
    hub.release("piip_tiny", content=file.getvalue())
    loaded = torch.hub.load(ROOT, "piip_backbone", "piip_tiny", source="local", pretrained=True).eval()
    image = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(list(loaded(image)), list(tiny_model(image)), rtol=0, atol=0)


def test_backbone_from_a_checkpoint_of_a_detector(monkeypatch, tiny_model, tmp_path):
    entry = zoo.get("piip_tsb_1120_896_448")
    config = tiny_model.pyramid.config
    monkeypatch.setattr(zoo, "get", lambda name: type(entry)(**{**vars(entry), "config": config}))
    state = {f"backbone.bottom_up.{name}": value for name, value in tiny_model.state_dict().items()}
    torch.save({"model": state | {"proposal_generator.bias": torch.zeros(2)}}, tmp_path / "model.pth")
    loaded = torch.hub.load(ROOT, "piip_backbone", entry.name, source="local", checkpoint=str(tmp_path / "model.pth"))
    assert isinstance(loaded, DensePIIP)
    image = torch.randn(1, 3, 128, 128)
    for have, want in zip(loaded.eval()(image), tiny_model(image), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
