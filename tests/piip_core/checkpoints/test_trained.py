"""Whole models from checkpoints of every origin."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from piip_core import ClassifierConfig, DensePIIP, PIIPClassifier
from piip_core.checkpoints import build_trained, our_names, to_published
from piip_core.errors import CheckpointError


@pytest.fixture
def forms(tiny_config):
    """The published and the training form of a classifier; the training form lacks the last interaction."""
    config = tiny_config(merging=None)
    branches = (
        dataclasses.replace(b, network=dataclasses.replace(b.network, class_token=True)) for b in config.branches
    )
    pyramid = dataclasses.replace(config, branches=tuple(branches))
    return [
        ClassifierConfig(pyramid=pyramid, num_classes=7, pooling=pooling) for pooling in ("first_patch", "class_token")
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_classifier_in_its_form_and_with_its_classes(forms, number, randomize, tmp_path):
    model = randomize(PIIPClassifier(dataclasses.replace(forms[number], num_classes=3)))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    found = build_trained(forms, path)
    assert found.config == model.config and not found.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_published_classifier_and_its_moving_average(forms, randomize, tmp_path):
    model, average = (randomize(PIIPClassifier(forms[0]), seed) for seed in (0, 1))
    names = our_names(forms[0], model.state_dict())
    published = [to_published(m.state_dict(), names)[0] for m in (model, average)]
    path = tmp_path / "model.pth"
    torch.save({"model": published[0], "model_ema": published[1]}, path)
    for ema, expected in ((False, model), (True, average)):
        found = build_trained(forms, path, ema=ema).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def test_backbone_out_of_a_detector(tiny_config, randomize, tmp_path):
    model = randomize(DensePIIP(tiny_config()))
    path = tmp_path / "model.pth"
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state | {"roi_heads.weight": torch.ones(2)}, "iteration": 3}, path)
    found = build_trained([tiny_config()], path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())

    with pytest.raises(CheckpointError, match=r"backbone\.pyramid\.branches\.1\.\S+ has shape .* expected"):
        build_trained([tiny_config(dims=(32, 40, 16))], path)
    with pytest.raises(CheckpointError, match=r"holds 0 complete sets of .* this PIIPClassifier .* Name the model"):
        build_trained([ClassifierConfig(pyramid=tiny_config(merging=None), pooling="average")], path)
