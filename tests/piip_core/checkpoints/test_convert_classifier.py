"""Published classifiers: every key of the listings, both ways, and their files."""

import dataclasses
import json

import pytest
import torch

from piip_core import ClassifierConfig, PIIPClassifier, zoo
from piip_core.checkpoints import (
    convert_file,
    from_published,
    model_shapes,
    our_names,
    read_checkpoint,
    read_config,
    recognise,
    to_published,
)
from piip_core.errors import CheckpointError

FILES = {
    "cls_piip_3branch_tsb_368-192-128_cls_token_deit1": "piip_tsb_368_192_128",
    "cls_piip_3branch_sbl_320-160-96_cls_token_augreg": "piip_sbl_320_160_96",
    "cls_piip_3branch_sbl_384-192-128_cls_token_augreg": "piip_sbl_384_192_128",
}


@pytest.fixture
def tiny(tiny_config):
    """The released form in small."""
    pyramid = tiny_config(merging=None)
    branches = [
        dataclasses.replace(b, network=dataclasses.replace(b.network, class_token=True)) for b in pyramid.branches
    ]
    pyramid = dataclasses.replace(pyramid, branches=tuple(branches))
    return ClassifierConfig(pyramid=pyramid, num_classes=7, pooling="first_patch")


@pytest.mark.parametrize("file", FILES)
def test_every_key_of_a_released_classifier_is_used_and_comes_back(file, listing, state_of):
    state = state_of(listing(file))
    found = recognise({key: tensor.shape for key, tensor in state.items()})
    config = zoo.classification(FILES[file]).config
    assert found == {FILES[file]: config}
    converted, report = from_published(state, config)
    assert report.complete and set(report.used) == set(state)
    assert {name: tensor.shape for name, tensor in converted.items()} == dict(model_shapes(config))
    assert converted["head.classifiers.2.bias"][0] == state["branch2.head.bias"][0]
    back, report = to_published(converted, our_names(config, converted))
    assert report.complete and back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].shape == tensor.shape and back[key].flatten()[-1] == tensor.flatten()[-1], key


def test_another_number_of_classes_is_recognised(listing, state_of):
    shapes = listing("cls_piip_3branch_tsb_368-192-128_cls_token_deit1")
    few = {key: (21, *shape[1:]) if ".head." in key else shape for key, shape in shapes.items()}
    assert {config.num_classes for config in recognise(few).values()} == {21}
    with pytest.raises(CheckpointError, match="piip_sbl_320_160_96"):
        recognise({key: (5, *shape[1:]) if key == "branch2.head.bias" else shape for key, shape in shapes.items()})


def test_files_have_the_weights_and_their_moving_average(tmp_path, tiny, randomize):
    models = [randomize(PIIPClassifier(tiny), seed=seed).eval() for seed in (1, 2)]
    states = [to_published(m.state_dict(), our_names(tiny, m.state_dict()))[0] for m in models]
    torch.save({"model": states[0], "model_ema": states[1], "optimizer": {}, "epoch": 3}, tmp_path / "public.pth")
    for ema, want in ((False, models[0]), (True, models[1])):
        done = convert_file(tmp_path / "public.pth", tmp_path / "ours.safetensors", config=tiny, ema=ema)
        assert done.report.complete and set(done.report.ignored) >= {"optimizer", "epoch"}
        model = PIIPClassifier(tiny).eval()
        model.load_state_dict(dict(read_checkpoint(done.path).state))
        image = torch.randn(2, 3, 128, 128)
        assert torch.equal(model(image), want(image))
    back = convert_file(tmp_path / "ours.safetensors", tmp_path / "back.pth", to_public=True)
    returned = read_checkpoint(back.path).state
    assert returned.keys() == states[1].keys() and all(torch.equal(returned[k], states[1][k]) for k in returned)


def test_a_file_without_moving_average_says_so(tmp_path, tiny):
    state = PIIPClassifier(tiny).state_dict()
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="model_ema"):
        read_checkpoint(tmp_path / "model.pth", ema=True)


def test_class_tokens_have_no_published_form(tiny):
    config = dataclasses.replace(tiny, pooling="class_token")
    with pytest.raises(CheckpointError, match="first_patch"):
        our_names(config, PIIPClassifier(config).state_dict())


def test_configurations_by_name_and_file(tmp_path, tiny):
    assert read_config("piip_sbl_320_160_96") == zoo.classification("piip_sbl_320_160_96").config
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.to_dict()))
    assert read_config(str(tmp_path / "tiny.json")) == tiny
