"""Families of networks that timm has: names, licences, and whether their weights fit."""

import re
from pathlib import Path

import pytest
import timm
import torch

from piip_core import BranchConfig, ConfigError, PIIPConfig, TimmConfig, zoo
from piip_core.branches import ConvNeXtConfig, build_branch
from piip_core.checkpoints.pretrained import convert_pretrained
from piip_core.meta import on_meta
from piip_core.zoo import families

NAMES = [f"{family}:{size}" for family, sizes in families.FAMILIES.items() for size in sizes]
LICENCES = {
    "dinov3": "dinov3-license",
    "dinov3_convnext": "dinov3-license",
    "siglip2": "apache-2.0",
    "pe_spatial": "apache-2.0",
    "eva02": "mit",
    "radio": "nvidia-open-model-license",
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_timm_fit(name):
    """Every tensor of the branch is in timm's network, whose others are known to be of no use."""
    weights = families.weights_of(name)
    assert weights in timm.list_pretrained() and families.licence_of(name) == LICENCES[name.partition(":")[0]]
    branch = families.branch(name, 224, window_size=14)
    assert branch.pretrained == f"timm:{weights}"
    with on_meta():
        model = build_branch(branch).model
        theirs = timm.create_model(weights.partition(".")[0]).state_dict()
    fitted, report = convert_pretrained(theirs, model.state_dict())
    report.check()
    assert fitted.keys() == model.state_dict().keys()
    assert set(branch.network.strides) == ({4, 8, 16, 32} if "convnext" in name else {16})


@pytest.mark.slow
def test_the_documents_say_which_networks_can_be_branches():
    """The table of docs/branches.md, network by network."""
    text = (Path(__file__).parents[2] / "docs" / "branches.md").read_text().partition("| timm's name |")[2]
    rows = [line.strip("| ").split(" | ") for line in text.partition("\n\n")[0].splitlines()[2:]]
    found = {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert len(found) > 45
    for name, (possible, *windows) in found.items():
        if possible != "yes":
            with pytest.raises(ConfigError, match="timm's class is"):
                TimmConfig(name=name)
            continue
        network = TimmConfig(name=name)
        assert (network.no_windows == "") == (windows == ["yes"]), name
        for window in (7, None) if windows == ["yes"] else (None,):
            with on_meta():
                branch = build_branch(BranchConfig(network=network, image_size=224, window_size=window))
                for height, width in ((224, 320), (448, 224)):
                    state = branch.run(branch.embed(torch.empty(1, 3, height, width)), 0, branch.num_blocks)
                    stride = branch.strides[-1]
                    assert state.tokens.shape == (1, height // stride, width // stride, branch.dims[-1]), name


def test_names_are_read_and_written():
    for text in ("dinov3:s,b,l", "dinov3:s+,b", "dinov3_convnext:t,dinov3:s,b", "convnextv2_tiny,dinov3:l"):
        assert families.label(families.parse(text)) == text
    assert families.parse("dinov3:s,l,eva02:b,convnextv2_tiny") == (
        "dinov3:s",
        "dinov3:l",
        "eva02:b",
        "convnextv2_tiny",
    )
    assert families.slug("dinov3:s+,b,l", (1568, 1120, 672)) == "piip_dinov3_splusbl_1568_1120_672"
    assert families.slug("dinov3_convnext:t,dinov3:b", (1024, 448)) == "piip_dinov3_convnext_t_dinov3_b_1024_448"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov3:x", "network 'dinov3:x': expected the name of a model of timm, or one of dinov3:s,s"),
        ("dino:s", "network 'dino:s': expected the name of a model"),
        ("resnet50", "timm's class is ResNet; .*an adapter that offers embed, run_block, layer_of.*CONTRIBUTING.md"),
        ("vit_tinny_patch16", "timm has no such model"),
    ],
)
def test_unknown_networks(name, message):
    with pytest.raises(ConfigError, match=message):
        families.network(name)


def test_entries():
    entry = families.entry("dinov3:s,l", (896, 448), window_size=14, frozen=True)
    large, small = entry.config.branches
    assert entry.name == "piip_dinov3_sl_896_448_frozen" and entry.resolution == "896/448"
    assert small.network == TimmConfig(name="vit_small_patch16_dinov3") and large.frozen and small.frozen
    assert (large.image_size, large.drop_path_rate, small.drop_path_rate) == (448, 0.4, 0.05)
    assert entry.pixel_mean == pytest.approx((123.675, 116.28, 103.53))  # ImageNet's
    assert families.entry("siglip2:b,l", (896, 448)).pixel_std == (127.5, 127.5, 127.5)
    staged = families.pyramid("dinov3_convnext:t,dinov3:b", (1024, 448), window_size=14)
    assert staged.merging == zoo.get("piip_ct_vs_vb_1024_672_448").config.merging
    assert isinstance(staged.branches[1].network, ConvNeXtConfig)
    with pytest.raises(ConfigError, match="2 sizes, one per network"):
        families.pyramid("dinov3:s,l", (896,))


def test_classifiers_read_class_tokens_where_all_have_one():
    assert families.classifier("dinov3:s,b", (224, 128)).pooling == "class_token"
    config = families.classifier("dinov3:s,siglip2:b", (224, 128))
    assert config.pooling == "average" and PIIPConfig.from_dict(config.pyramid.to_dict()) == config.pyramid
