"""The classifier: what its heads read, where its weights come from, and its configuration."""

import dataclasses

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from piip_core import ClassifierConfig, ConfigError, PIIPClassifier
from piip_core.checkpoints import load_pretrained

SIZES = ((32, 64), (24, 96), (16, 128))


@pytest.fixture
def make_config(tiny_config):
    """A small classifier; branches have class tokens unless the head is merged."""

    def make(head="separate", pooling="class_token", num_classes=5, **network):
        pyramid = tiny_config(merging=None)
        network = {"class_token": head == "separate", "class_position": pooling == "class_token"} | network
        network["class_position"] &= network["class_token"]
        branches = tuple(
            dataclasses.replace(b, network=dataclasses.replace(b.network, pos_grid=b.image_size // 16, **network))
            for b in pyramid.branches
        )
        pyramid = dataclasses.replace(pyramid, branches=branches)
        return ClassifierConfig(pyramid=pyramid, head=head, pooling=pooling, num_classes=num_classes, num_groups=8)

    return make


KINDS = (("separate", "class_token"), ("separate", "first_patch"), ("separate", "average"), ("merged", "average"))


@pytest.mark.parametrize(("head", "pooling"), KINDS)
def test_every_parameter_matters(make_config, randomize, head, pooling):
    """Nothing is idle, so distributed training needs no search for unused parameters."""
    model = randomize(PIIPClassifier(make_config(head, pooling))).eval()  # stochastic depth may drop a whole batch
    logits = model(torch.randn(3, 3, 128, 128))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_separate_heads_average_what_each_says_of_its_own_token(make_config, randomize):
    image = torch.randn(2, 3, 128, 128)
    reads = {
        "class_token": lambda state: state.prefix[:, 0],
        "first_patch": lambda state: state.tokens[:, 0, 0],
        "average": lambda state: None,
    }
    for pooling, read in reads.items():
        model = randomize(PIIPClassifier(make_config(pooling=pooling))).eval()
        logits = []
        for number, state in enumerate(model.forward_features(image), 1):
            norm, classifier = model.head.norms[str(number)], model.head.classifiers[str(number)]
            token = norm(state.tokens).mean(dim=(1, 2)) if pooling == "average" else norm(read(state))
            logits.append(classifier(token))
        torch.testing.assert_close(model(image), torch.stack(logits).mean(dim=0))


def test_without_classes_it_gives_pooled_features(make_config):
    image = torch.randn(2, 3, 128, 128)
    for head, width in (("separate", 32 + 24 + 16), ("merged", 32)):
        model = PIIPClassifier(make_config(head, "average")).eval()
        states = model.forward_features(image)
        pooled = model.forward_head(states, pre_logits=True)
        model.reset_classifier(0)
        assert model.num_classes == 0 and pooled.shape == (2, width) == (2, model.num_features)
        assert torch.equal(model(image), pooled)
        model.reset_classifier(3)
        assert model(image).shape == (2, 3)


@pytest.fixture
def pretrained(make_config, tmp_path, randomize):
    """A classifier whose branches name files of timm's ViTs, and those ViTs."""
    config, branches, networks = make_config(layer_scale=None), [], []
    for branch in config.pyramid.branches:
        net, path = branch.network, tmp_path / f"{branch.network.embed_dim}.pth"
        sizes = {"embed_dim": net.embed_dim, "depth": net.depth, "num_heads": net.num_heads, "num_classes": 5}
        networks.append(randomize(VisionTransformer(img_size=branch.image_size, **sizes)).eval())
        torch.save(networks[-1].state_dict(), path)
        branches.append(dataclasses.replace(branch, pretrained=str(path)))
    pyramid = dataclasses.replace(config.pyramid, branches=tuple(branches))
    return dataclasses.replace(config, pyramid=pyramid), networks


def test_starts_as_the_mean_of_its_pretrained_networks(pretrained):
    """New interactions change nothing, so each branch is the pretrained network on its own image."""
    config, networks = pretrained
    model = PIIPClassifier(config).eval()
    reports = load_pretrained(model)
    assert all(report.complete and not report.ignored for report in reports.values())
    image = torch.randn(2, 3, 128, 128)
    seen = [network(_shrink(image, 128, side)) for network, (_, side) in zip(networks, SIZES, strict=True)]
    torch.testing.assert_close(model(image), torch.stack(seen).mean(dim=0), rtol=1e-5, atol=1e-5)


def _shrink(image, largest, side):
    if side == largest:
        return image
    return torch.nn.functional.interpolate(image, scale_factor=side / largest, mode="bilinear")


def test_another_number_of_classes_keeps_the_norms_and_says_so(pretrained):
    config, networks = pretrained
    model = PIIPClassifier(dataclasses.replace(config, num_classes=3))
    report = load_pretrained(model)[1]
    assert torch.equal(model.head.norms["1"].weight, networks[0].norm.weight)
    assert "head.weight keeps its initial values: the file has none of shape (3, 32)" in report.summary()


def test_configuration_survives_json_and_names_what_is_wrong(make_config):
    config = make_config()
    assert ClassifierConfig.from_dict(config.to_dict()) == config
    for change, message in (
        ({"pooling": "mean"}, "average"),
        ({"head": "joint"}, "merged"),
        ({"num_classes": -1}, "0 or more"),
        ({"drop_rate": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **change)
    with pytest.raises(ConfigError, match=r"branches \[1, 2, 3\] have no class token"):
        make_config(class_token=False)
    with pytest.raises(ConfigError, match="classes"):
        ClassifierConfig.from_dict(config.to_dict() | {"classes": 3})


def test_dense_merging_does_not_go_with_a_head(tiny_config):
    with pytest.raises(ConfigError, match="merging"):
        ClassifierConfig(pyramid=tiny_config(), head="merged")
