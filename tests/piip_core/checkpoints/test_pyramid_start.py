"""The pyramid of one model as the start of another."""

import dataclasses

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from piip_core import PIIP, ClassifierConfig, DensePIIP, MergingConfig, PIIPClassifier
from piip_core.checkpoints import find_pyramid, load_pyramid, pyramid_prefix, read_checkpoint, write_checkpoint
from piip_core.errors import CheckpointError


def _classifier(pyramid, pooling="average", **network):
    branches = tuple(
        dataclasses.replace(b, network=dataclasses.replace(b.network, **network)) for b in pyramid.branches
    )
    pyramid = dataclasses.replace(pyramid, branches=branches)
    return PIIPClassifier(ClassifierConfig(pyramid=pyramid, pooling=pooling, num_classes=3))


def _dense(tiny_config, **options):
    model = nn.ModuleDict({"neck": nn.Linear(2, 2), "backbone": DensePIIP(tiny_config(**options))})
    return model, find_pyramid(model)[1]


def test_the_pyramid_computes_in_the_detector_what_it_did_in_the_classifier(tiny_config, randomize, tmp_path):
    trained = randomize(_classifier(tiny_config(merging=None))).eval()
    path = write_checkpoint(tmp_path / "classifier.safetensors", trained.state_dict())
    model, pyramid = _dense(tiny_config)
    neck = model["neck"].weight.clone()
    report = load_pyramid(pyramid, read_checkpoint(path).state, source=str(path))
    image = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        for found, expected in zip(pyramid.eval()(image), trained.pyramid(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(model["neck"].weight, neck)
    assert {name.split(".")[0] for name in report.ignored} == {"head"}
    assert report.complete and set(report.used) == set(pyramid.state_dict())


def test_a_classifier_of_class_tokens_brings_all_but_the_last_interaction(tiny_config, randomize):
    """Its tables have a position for the class token, and no interaction is behind its last blocks."""
    trained = _classifier(tiny_config(merging=None), "class_token", class_token=True, class_position=True)
    randomize(trained)
    pyramid = PIIP(tiny_config(merging=None)).eval()
    report = load_pyramid(pyramid, trained.state_dict())
    image = torch.randn(1, 3, 128, 128)
    first, final = pyramid.forward_intermediates(image, (0,))[1][0], pyramid(image)
    assert all(name.startswith("interactions.1.") for name in report.filled) and report.filled
    for index, branch in enumerate(pyramid.branches):
        table = trained.pyramid.branches[index].model.pos_embed
        assert torch.equal(branch.model.pos_embed, table[:, 1:])
        assert "cls_token" in [name.rsplit(".")[-1] for name in report.ignored]
        # The new interaction changes nothing: what it is given are the last blocks' tokens
        alone = branch.model.blocks[-1](first[index].flatten(2).transpose(1, 2))
        torch.testing.assert_close(final[index].flatten(2).transpose(1, 2), alone)


def test_position_tables_are_resized_to_the_grid_of_the_model(tiny_config, randomize):
    trained = randomize(_classifier(tiny_config(merging=None), pos_grid=6))
    pyramid = PIIP(tiny_config(merging=None))
    report = load_pyramid(pyramid, trained.state_dict())
    table = trained.pyramid.branches[1].model.pos_embed
    expected = resample_abs_pos_embed(table, (4, 4), (6, 6), num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(pyramid.branches[1].model.pos_embed, expected)
    assert "branch 2: position grid resized from 6 x 6 to 4 x 4" in report.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (32, 24, 8)}, r"branch 3: patch_embed\.proj\.weight: shape \(16, 3, 16, 16\) in the file, \(8, "),
        ({"dims": (32, 24), "sizes": (64, 128)}, r"keys that no rule knows: branches\.2\.model\."),
        ({"depth": 4}, r"tensors of the model that the file lacks: branches\.0\.model\.blocks\.2\."),
    ],
)
def test_another_pyramid_is_an_error_and_changes_nothing(tiny_config, options, message):
    state = _classifier(tiny_config(merging=None)).state_dict()
    pyramid = PIIP(tiny_config(merging=None, **options))
    before = {name: tensor.clone() for name, tensor in pyramid.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_pyramid(pyramid, state, source="digits.pth")
    assert str(error.value).startswith("digits.pth: its pyramid is not that of the model")
    assert all(torch.equal(before[name], tensor) for name, tensor in pyramid.state_dict().items())


def test_models_and_files_without_one_pyramid(tiny_config):
    pyramid = tiny_config(merging=None)
    assert find_pyramid(nn.Linear(2, 2)) is None and pyramid_prefix(nn.Linear(2, 2).state_dict()) is None
    two = nn.ModuleDict({"a": PIIP(pyramid), "b": PIIP(pyramid)})
    assert find_pyramid(two) is None and pyramid_prefix(two.state_dict()) is None
    with pytest.raises(CheckpointError, match="one PIIP pyramid"):
        load_pyramid(two["a"], two.state_dict())
    model = DensePIIP(dataclasses.replace(pyramid, merging=MergingConfig()))
    assert find_pyramid(model)[0] == pyramid_prefix(model.state_dict()) == "pyramid."
    assert pyramid_prefix(model.pyramid.state_dict()) == ""
