"""Names against the listings of released models; numbers are proven by the golden cases."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from piip_core import BranchConfig, DensePIIP, InteractionConfig, MergingConfig, zoo
from piip_core.branches import BEiTConfig
from piip_core.checkpoints import (
    PublishedNames,
    from_published,
    model_shapes,
    published_names,
    recognise,
    to_published,
)
from piip_core.errors import CheckpointError

TSB = "mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16"
TSBL = "mask_rcnn_deit_tsbl_1568_1120_672_448_fpn_1x_coco_bs16"
DINO_SBL = "dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms"
DATA = Path(__file__).parents[2] / "data"
OWN_BRANCH4 = "__branch4_own_cfg"


def listed_rows():
    """Listing of every released model -> the row of the zoo that it is."""
    settings = json.loads((DATA / "zoo_settings.json").read_text())
    rows = {Path(row["config_file"]).stem: name for name, row in settings.items()}
    files = sorted(path.name.removesuffix(".tsv.gz") for path in (DATA / "state_dicts").glob("*.tsv.gz"))
    known = {file: rows.get(file.removesuffix(OWN_BRANCH4)) for file in files}
    assert set(rows.values()) <= set(known.values())
    return {file: row for file, row in known.items() if row is not None}


ROWS = listed_rows()


def head_listing(name):
    """Neck and heads behind a row."""
    entry = zoo.get(name)
    merging = entry.config.merging
    widths = {entry.config.dims_after(interaction)[0] for interaction in (*merging.intermediate_after, None)}
    if len(widths) > 1 or entry.name == "convnext_b_1024":
        return "head_mask_rcnn_convnext_b"
    kind = {"dino": "dino_4scale", "upernet": "upernet"}.get(entry.head, entry.head)
    return f"head_{kind}_dim{widths.pop()}" + ("_ch1536" if entry.head == "upernet" else "")


def with_position_grids(config, shapes):
    """The configuration with the position tables that the listed file has (other pretraining sizes)."""
    grids = [round((shapes[f"backbone.branch{i}.pos_embed"][1] - 0.5) ** 0.5) for i in (1, 2, 3)]
    branches = tuple(
        dataclasses.replace(branch, network=dataclasses.replace(branch.network, pos_grid=grid))
        for branch, grid in zip(config.branches, grids, strict=True)
    )
    return dataclasses.replace(config, branches=branches)


def assert_same(first, second):
    """Equal names, shapes and numbers; listed tensors are constant, so their corners stand for them."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape, name
        for corner in (0, -1):
            place = (corner,) * tensor.ndim
            assert tensor[place] == second[name][place], name


@pytest.mark.parametrize("row", ROWS)
def test_every_key_of_a_released_detector_is_used_and_comes_back(row, listing, state_of):
    name = ROWS[row]
    state = state_of({**listing(row), **listing(head_listing(name))})
    found = recognise({key: tensor.shape for key, tensor in state.items()})
    config = found[name]
    assert {zoo.get(other).head for other in found} == {zoo.get(name).head}
    as_released = config != zoo.get(name).config
    assert as_released == (len(config.branches) == 4 and not row.endswith(OWN_BRANCH4))
    converted, report = from_published(state, config)
    assert report.complete and {*report.used, *report.ignored} == set(state)
    prefix = published_names(config, state).ours_prefix
    backbone = {n.removeprefix(prefix): t.shape for n, t in converted.items() if n.startswith(prefix)}
    assert backbone == dict(model_shapes(config))
    assert all("never uses" in reason or "computed here" in reason for reason in report.ignored.values())
    back, report = to_published(converted, published_names(config, state))
    assert report.complete
    assert back.keys() == state.keys()
    slots = {key for key in state if key.endswith("pos_embed")}  # an entry of these may be dropped, see below
    for name, tensor in state.items():
        assert back[name].shape == tensor.shape
    untouched = state.keys() - report.filled.keys() - slots
    assert_same({key: back[key] for key in untouched}, {key: state[key] for key in untouched})


def test_a_backbone_alone_is_filled_exactly(listing, state_of):
    config = zoo.get(ROWS[TSB]).config
    converted, report = from_published(state_of(listing(TSB)), config, backbone_only=True)
    assert report.complete
    assert {name: tensor.shape for name, tensor in converted.items()} == dict(model_shapes(config))


def test_cascades_are_recognised_by_their_heads(listing):
    row = "mask_rcnn_deit_sbl_1568_1120_672_fpn_1x_coco_bs16"
    heads = listing("head_cascade_mask_rcnn_dim1024_default_mmdet")
    names = recognise({**listing(row), **heads})
    assert set(names) == {"piip_sbl_1568_1120_672_cascade_1x", "piip_sbl_1568_1120_672_cascade_3x_ms"}


def test_what_follows_from_the_window_is_made_again(tiny_config):
    network = BEiTConfig(embed_dim=32, depth=1, num_heads=4, bias_window=3)
    branch = BranchConfig(network=network, image_size=64, window_size=3)
    config = dataclasses.replace(tiny_config(), branches=(branch, *tiny_config().branches[1:]))
    published, report = to_published(DensePIIP(config).state_dict(), PublishedNames(config, ("beit", "deit", "deit")))
    index = published["branch1.blocks.0.attn.relative_position_index"]
    assert index.shape == (9, 9) and index.dtype == torch.int64 and "branch1.blocks.0.attn" in next(iter(report.filled))
    for query in range(9):
        for key in range(9):
            dy, dx = query // 3 - key // 3, query % 3 - key % 3
            assert index[query, key] == (dy + 2) * 5 + dx + 2


@pytest.mark.parametrize("family", ["augreg", "mae", "dinov2"])
def test_the_other_vit_class_loses_only_the_slot_of_the_class_token(family, listing, state_of):
    state = state_of(listing(f"mask_rcnn_{family}_sbl_1568_1120_672_fpn_1x_coco_bs16"))
    config = with_position_grids(zoo.get("piip_sbl_1568_1120_672").config, listing_shapes(state))
    converted, report = from_published(state, config)
    assert report.complete and not report.ignored
    assert any("entry 0" in note for note in report.notes)
    back, report = to_published(converted, published_names(config, state))
    assert report.complete
    expected = dict(state)
    for key in state:
        if key.endswith("pos_embed") and state[key].shape[1] != converted_positions(converted, key):
            expected[key] = torch.cat((torch.zeros_like(state[key][:, :1]), state[key][:, 1:]), dim=1)
    assert_same(back, expected)


def listing_shapes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def converted_positions(converted, key):
    number = int(key.split(".")[1].removeprefix("branch"))
    return converted[f"backbone.bottom_up.features.pyramid.branches.{number - 1}.model.pos_embed"].shape[1]


def test_parameters_that_dino_never_uses_are_ignored_with_a_reason_and_written_back_as_zeros(listing, state_of):
    state = state_of(listing(DINO_SBL))
    config = zoo.get("piip_sbl_1568_1120_672").config
    config = dataclasses.replace(config, merging=MergingConfig(out_strides=(8, 16, 32)))
    config = with_position_grids(config, listing_shapes(state))
    converted, report = from_published(state, config)
    assert report.complete
    assert set(report.ignored) == {key for key in state if key.startswith("backbone.fpn1.")}
    assert all("never uses" in reason for reason in report.ignored.values())
    back, report = to_published(converted, published_names(config, state))
    assert set(report.filled) == {key for key in state if key.startswith("backbone.fpn1.")}
    assert listing_shapes(back) == listing_shapes(state)


def test_regular_merging_has_the_names_of_the_hybrid_models(listing):
    published = listing("mask_rcnn_convnext-t_vit-s_vit-b_1024_672_448_regular-fpn")
    config = dataclasses.replace(
        zoo.get("piip_tsb_1568_1120_672").config,
        merging=MergingConfig(kind="regular", intermediate_after=(0, 1, 10)),
    )
    table = PublishedNames(config, ("deit",) * 3, published_prefix="backbone.").table()
    ours = {name for name in model_shapes(config) if name.startswith("merging.")}
    expected = {key for key in published if key.split(".")[1].startswith(("merge_branch", "intermediate", "w"))}
    assert {key for name in ours for key, _ in table.to_published(name)} == expected


@pytest.mark.parametrize("interaction", [{"projection": False, "norm": "none"}, {"attention": "regular"}])
def test_every_interaction_variant_converts_both_ways(interaction, tiny_config, randomize):
    config = tiny_config(interaction=InteractionConfig(num_interactions=2, num_heads=4, **interaction))
    state = randomize(DensePIIP(config)).state_dict()
    names = PublishedNames(config, ("deit", "internvit", "deit"))
    published, report = to_published(state, names)
    assert report.complete
    back, report = from_published(published, config)
    assert report.complete and back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_unknown_and_missing_keys_are_errors_that_name_them(tiny_config, randomize):
    config = tiny_config()
    state, _ = to_published(randomize(DensePIIP(config)).state_dict(), PublishedNames(config, ("deit",) * 3))
    state["branch1.blocks.0.attn.surprise"] = torch.zeros(1)
    del state["w2"]
    converted, report = from_published(state, config, source="file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth[\s\S]*surprise[\s\S]*merging\.final\.weights"):
        report.check()
    assert report.check(allow_incomplete=True) is report
    assert "surprise" in report.summary()
    assert "merging.final.weights" not in converted


def test_a_wrong_shape_is_an_error_even_if_incomplete_files_are_allowed(tiny_config, randomize):
    config = tiny_config()
    state, _ = to_published(randomize(DensePIIP(config)).state_dict(), PublishedNames(config, ("deit",) * 3))
    state["fpn2.0.bias"] = torch.zeros(7)
    _, report = from_published(state, config)
    with pytest.raises(CheckpointError, match=r"levels\.8\.0\.bias: shape \(7,\) in the file, \(32,\) in the model"):
        report.check(allow_incomplete=True)


def test_files_of_no_published_model_are_not_recognised(listing):
    shapes = listing(TSB)
    shapes["backbone.fpn2.0.bias"] = (3,)
    with pytest.raises(CheckpointError, match="fit no published model"):
        recognise(shapes)
