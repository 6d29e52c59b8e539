"""The published classifiers against the settings, counts and file listings of the public implementation."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import timm
import torch

from checkers.public_config import classifier_from_public
from piip_core import PIIPClassifier, zoo
from piip_core.checkpoints import load_pretrained
from piip_core.errors import ConfigError
from piip_core.meta import on_meta
from piip_tools.flops.published import published_count
from piip_tools.flops.tables import analyze_zoo, classification_table

DATA = Path(__file__).parents[1] / "data"
SETTINGS = json.loads((DATA / "classification_settings.json").read_text())
RELEASED = sorted(SETTINGS)
# The network of timm that each of the paper's baselines is
BASELINES = {
    "deit_b_224": "deit_base_patch16_224",
    "vit_l_224": "vit_large_patch16_224",
    "vit_b_224": "deit3_base_patch16_224",
}


def released_shapes(name):
    file = Path(SETTINGS[name]["config_file"]).stem
    with gzip.open(DATA / "state_dicts" / f"cls_{file}.tsv.gz", "rt") as listing:
        rows = [line.split("\t") for line in list(listing)[1:]]
    return {key: tuple(map(int, shape.split("x"))) for key, shape, _ in rows}


def without_weights(config):
    branches = tuple(dataclasses.replace(branch, pretrained=None) for branch in config.pyramid.branches)
    return dataclasses.replace(config, pyramid=dataclasses.replace(config.pyramid, branches=branches))


def test_every_released_classifier_is_there_by_its_name():
    names = [entry.name for entry in zoo.classification_entries()]
    assert sorted(names) == sorted([*RELEASED, *BASELINES, "piip_b_512_256_128"])
    assert all(zoo.classification(name).name == name for name in names)
    with pytest.raises(ConfigError, match="piip_tsb_368_192_128"):
        zoo.classification("piip_tsb_368")


@pytest.mark.parametrize("name", RELEASED)
def test_is_what_the_public_settings_build(name):
    public = classifier_from_public(SETTINGS[name]["backbone"], released_shapes(name))
    entry = zoo.classification(name)
    ours = without_weights(entry.config)
    spread = [dataclasses.replace(b, segments=None) for b in public.pyramid.branches]  # even segments, written out
    assert [public.pyramid.segments(n) for n in (1, 2, 3)] == [ours.pyramid.segments(n) for n in (1, 2, 3)]
    windows = [dataclasses.replace(b, window_size=None, window_padding="before_qkv") for b in spread]
    assert all(set(branch.window_sizes) == {None} for branch in spread)
    public = dataclasses.replace(public, pyramid=dataclasses.replace(public.pyramid, branches=tuple(windows)))
    assert ours == public


@pytest.mark.parametrize("name", RELEASED)
def test_numbers_are_the_published_ones(name):
    entry, printed = zoo.classification(name), SETTINGS[name]["published"]
    assert [entry.published.top1, entry.published.params_m, entry.published.flops_g] == list(printed.values())
    assert Path(zoo.released(name).file).stem == Path(SETTINGS[name]["config_file"]).stem


@pytest.mark.parametrize("name", RELEASED)
def test_pretrained_weights_are_the_published_ones(name):
    for branch, number in zip(zoo.classification(name).config.pyramid.branches, (1, 2, 3), strict=True):
        source, ours = SETTINGS[name]["backbone"][f"branch{number}"]["pretrained"], branch.pretrained
        if "deit" in source:
            assert ours == f"timm:{Path(source).stem.rpartition('-')[0]}.fb_in1k"
        else:
            stem = Path(source).stem
            assert stem[:6] == f"{stem[0]}_16-i" and stem.endswith("res_224") and "imagenet2012" in stem
            size = {"S": "small", "B": "base", "L": "large"}[stem[0]]
            assert ours == f"timm:vit_{size}_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.parametrize("name", RELEASED)
def test_counts_are_the_published_ones(name):
    entry = zoo.classification(name)
    total = published_count(entry.config).total
    assert total.macs / 1e9 == pytest.approx(SETTINGS[name]["recomputed"]["flops_G"], rel=3e-4)
    assert total.params / 1e6 == pytest.approx(SETTINGS[name]["recomputed"]["params_M"], rel=3e-4)
    assert total.macs / 1e9 == pytest.approx(entry.published.flops_g, rel=0.003)
    assert total.params / 1e6 == pytest.approx(entry.published.params_m, rel=0.003)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_timms_networks(name, tmp_path):
    """The same scores with the same weights, here of two blocks."""
    (branch,) = zoo.classification(name).config.pyramid.branches
    with on_meta():
        assert len(timm.create_model(BASELINES[name]).blocks) == branch.network.depth
    plain = timm.create_model(BASELINES[name], depth=2)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    network = dataclasses.replace(branch.network, depth=2)
    branch = dataclasses.replace(branch, network=network, pretrained=str(tmp_path / "plain.pth"))
    config = zoo.classification(name).config
    config = dataclasses.replace(config, pyramid=dataclasses.replace(config.pyramid, branches=(branch,)))
    model = PIIPClassifier(config).eval()
    load_pretrained(model)
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(image), plain.eval()(image))


def test_gains_over_the_baselines_are_those_of_the_papers_text():
    """Sections IV-D: of accuracy, and of #FLOPs at the same accuracy."""
    top1 = {entry.name: entry.published.top1 for entry in zoo.classification_entries()}
    assert top1["piip_tsb_368_192_128"] - top1["deit_b_224"] == pytest.approx(0.3)
    assert top1["piip_sbl_384_192_128"] - top1["vit_l_224"] == pytest.approx(0.7)
    assert top1["piip_b_512_256_128"] - top1["vit_b_224"] == pytest.approx(0.7)
    cheaper, large = (zoo.classification(name).published for name in ("piip_sbl_320_160_96", "vit_l_224"))
    assert cheaper.top1 == large.top1 and 1 - cheaper.flops_g / large.flops_g == pytest.approx(0.367, abs=5e-4)


def test_counts_of_the_baselines_are_the_printed_ones():
    """Those from scratch are printed cut off: 100.96M as 100M, 86.6M as 86M, 17.56G as 17.5G."""
    counts = {name: published_count(zoo.classification(name).config).total for name in BASELINES}
    assert round(counts["vit_l_224"].macs / 1e9, 1) == zoo.classification("vit_l_224").published.flops_g
    scratch = zoo.classification("vit_b_224").published
    assert counts["vit_b_224"].params // 1e6 == scratch.params_m
    assert counts["vit_b_224"].macs // 1e8 == round(10 * scratch.flops_g)


def test_from_scratch_counts_are_those_of_the_papers_table():
    """The parts are printed truncated, or rounded; #Param 100M leaves out the last linear (0.64M)."""
    entry = zoo.classification("piip_b_512_256_128")
    count = published_count(entry.config)
    printed = ((59.6, 3.8), (15.1, 4.3), (4.0, 4.9), (21.2, 5.1))
    for part, (params, flops) in zip((*count.branches, count.interactions), printed, strict=True):
        assert part.params / 1e6 == pytest.approx(params, abs=0.1)
        assert part.macs / 1e9 == pytest.approx(flops, abs=0.1)
    assert count.total.macs / 1e9 == pytest.approx(entry.published.flops_g, rel=0.003)
    linear = 640 * 1000 + 1000
    assert (count.total.params - linear) / 1e6 == pytest.approx(100.3, rel=0.003)


def test_our_modules_hold_and_run_what_the_rule_counts():
    for row in analyze_zoo([zoo.classification("piip_tsb_368_192_128")]):  # `make tables` counts them all
        assert row.executed.params == pytest.approx(row.published_count.params, rel=1e-3)
        assert row.executed.macs == pytest.approx(row.published_count.macs, rel=0.02)
        assert f"`{row.entry.name}`" in classification_table([row], lambda _: "")


@pytest.mark.parametrize("name", RELEASED)
def test_new_training_reads_class_tokens_that_have_positions(name):
    entry = zoo.classification(name)
    assert (entry.config.pooling, entry.training_config.pooling) == ("first_patch", "class_token")
    for old, new in zip(entry.config.pyramid.branches, entry.training_config.pyramid.branches, strict=True):
        network = dataclasses.replace(old.network, class_position=True)
        assert new == dataclasses.replace(old, network=network) and not old.network.class_position
    with on_meta():
        old, new = PIIPClassifier(entry.config), PIIPClassifier(entry.training_config)
    # Nothing reads what an interaction behind the last blocks writes
    assert (len(old.pyramid.interactions), len(new.pyramid.interactions)) == (12, 11)
