"""Settings of the paper's ablations: they build, cost what is printed, and differ in what their names say."""

import collections
import dataclasses
import math

import pytest
import torch

from piip_core import DensePIIP, PIIPConfig, zoo
from piip_core.meta import on_meta
from piip_core.zoo.ablations import ABLATIONS, CHAT_ABLATIONS, FIGURE_SETTINGS, FIGURES, TABLES
from piip_tools.flops.published import published_count

# number of settings with a printed row, per table of the paper
ROWS = {"II": 1, "IX": 7, "XIV": 12, "XV": 3, "XVI": 11, "XVII": 5}
# As printed: interactions, what is unfrozen in pretraining, image sizes, #FLOPs, scores
TABLE_XIII = """
| 2 | none | 512/256 | 193G | 65.0 | 34.0 | 57.9 | 68.8 | 62.8 | 79.1 | 67.3 | 86.5 | 65.2 |
| 0 | none | 528/256 | 196G | 65.7 | 29.5 | 56.8 | 69.2 | 63.0 | 78.9 | 66.8 | 85.4 | 64.4 |
| 12 | none | 464/256 | 194G | 64.6 | 31.3 | 57.4 | 69.5 | 62.7 | 79.1 | 67.1 | 86.1 | 64.7 |
| 2 | interactions | 512/256 | 193G | 63.2 | 25.4 | 52.4 | 70.6 | 61.1 | 75.9 | 62.7 | 85.5 | 62.1 |
| 2 | all | 512/256 | 193G | 34.3 | 15.1 | 43.3 | 67.7 | 44.6 | 52.3 | 41.0 | 71.9 | 46.3 |
"""
# #FLOPs of Tables XVI and XVII from the public counting script
SCRIPT_GFLOPS = {"direction_alternating": 209.6, "direction_cycle_down": 229.0, "direction_cycle_up": 229.6}


def printed_costs():
    for name, setting in ABLATIONS.items():
        for field, unit in (("params_m", 1e6), ("flops_g", 1e9)):
            if getattr(setting.paper, field) is not None:
                yield pytest.param(name, field, unit, id=f"{name}-{field}")


def test_the_tables_are_complete():
    printed = collections.Counter(s.table for s in ABLATIONS.values() if s.paper.box_ap is not None)
    assert printed == ROWS and ROWS.keys() | {"XIII"} == TABLES.keys()
    assert all(s.note == "not in the paper" for s in ABLATIONS.values() if s.paper.box_ap is None)


@pytest.mark.parametrize(("name", "field", "unit"), printed_costs())
def test_printed_costs(name, field, unit):
    setting = ABLATIONS[name]
    printed, total = (
        getattr(setting.paper, field),
        published_count(setting.config).total,
    )
    counted = (total.params if field == "params_m" else total.macs) / unit
    met = abs(counted - printed) < max(0.5, 0.003 * printed)  # printed are whole numbers
    explained = setting.note.startswith({"params_m": "#Param:", "flops_g": "#FLOPs:"}[field])
    assert met != explained
    assert counted == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize(("name", "giga"), SCRIPT_GFLOPS.items())
def test_directions_cost_what_the_public_script_counts(name, giga):
    assert round(published_count(ABLATIONS[name].config).total.macs / 1e9, 1) == giga


@pytest.mark.parametrize("name", ABLATIONS)
def test_builds_and_survives_plain_data(name):
    config = ABLATIONS[name].config
    assert PIIPConfig.from_dict(config.to_dict()) == config
    with on_meta():
        model = DensePIIP(config)
    assert model.out_strides == (4, 8, 16, 32)
    assert len(model.pyramid.interactions) == config.num_interactions
    # the published count less its head, and less position tables stored for another grid, is what is built
    positions = sum((b.image_size // 16) ** 2 * b.network.embed_dim for b in config.branches)
    counted = published_count(config, rule="classifier")
    wanted = sum(part.params for part in counted.branches) - positions + counted.interactions.params
    tables = sum(b.network.pos_grid**2 * b.network.embed_dim for b in config.branches)
    assert sum(p.numel() for p in model.pyramid.parameters()) == wanted + tables
    if config.num_interactions == 0:
        assert counted.interactions.params == 0 and not any("interaction" in key for key in model.state_dict())
    if ABLATIONS[name].table == "IX":  # branches that go out have only their merging
        numbers = {str("BST".index(size.upper()) + 1) for size in name.removeprefix("out_").split("_")}
        merging = model.merging.final
        assert set(merging.projections) == numbers and merging.weights.shape == (len(numbers),)
        assert {key.split(".")[1] for key in merging.projections.state_dict(prefix="projections.")} == numbers


def test_parameter_direct_pyramids_keep_the_largest_image(tiny_config, randomize):
    """The input is the largest image, wherever it stands; merging happens on its grid."""
    direct = tiny_config(sizes=(128, 96, 64))
    model = randomize(DensePIIP(direct)).eval()
    assert model.pyramid.factors == [1, 0.75, 0.5]
    image = torch.randn(1, 3, 128, 128)
    finals = model.pyramid(image)
    assert [tuple(x.shape[-2:]) for x in finals] == [(8, 8), (6, 6), (4, 4)]
    assert [tuple(x.shape[-2:]) for x in model(image)] == [(side, side) for side in (32, 16, 8, 4)]
    assert model.out_strides == (4, 8, 16, 32)


def test_the_parameter_direct_setting_is_trained_on_its_largest_image():
    setting = ABLATIONS["design_tsb_448_672_896"]
    assert setting.resolution == "448/672/896"
    assert setting.image_size == 896
    widths = [branch.network.embed_dim for branch in setting.config.branches]
    assert widths == sorted(widths, reverse=True)


def test_branches_of_equal_size_all_see_the_whole_image(tiny_config):
    model = DensePIIP(tiny_config(sizes=(96, 96, 96)))
    assert model.pyramid.factors == [1, 1, 1]
    assert [tuple(x.shape[-2:]) for x in model.pyramid(torch.randn(1, 3, 96, 96))] == [(6, 6)] * 3


def test_one_direction_settings_share_the_work_of_both():
    """The alternating directions are half of the default, the two cycles together the bidirectional cycle."""
    interactions = {
        name: published_count(setting.config).interactions
        for name, setting in ABLATIONS.items()
        if "XVII" in setting.table
    }
    adjacent = interactions["direction_adjacent"]
    both = interactions["direction_cycle_down"] + interactions["direction_cycle_up"]
    assert both == interactions["direction_bidirectional_cycle"]
    assert math.isclose(interactions["direction_alternating"].macs, adjacent.macs / 2)


@pytest.mark.parametrize("name", [name for name, setting in ABLATIONS.items() if setting.table in ("IX", "XVII")])
def test_gradients_reach_all_parameters_if_all_branches_are_merged(name, tiny_config):
    """With fewer, tools/sweep.py tells distributed training that some parameters get none."""
    config = ABLATIONS[name].config
    interaction = dataclasses.replace(config.interaction, num_heads=2, num_interactions=2)
    model = DensePIIP(tiny_config(sizes=(32, 48, 64), interaction=interaction, merging=config.merging))
    sum(level.sum() for level in model(torch.randn(1, 3, 64, 64))).backward()
    reached = all(parameter.grad is not None for parameter in model.parameters())
    assert reached == (config.merging_branches == (1, 2, 3))


def test_settings_of_piip_llava_are_those_of_table_xiii():
    parts = {"none": (), "interactions": ("interactions",), "all": ("vision_tower",)}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE_XIII.strip().splitlines()]
    for (count, unfrozen, sizes, flops, *scores), setting in zip(lines, CHAT_ABLATIONS.values(), strict=True):
        assert zoo.multimodal(setting.name) is setting and setting.table == "XIII"
        assert (setting.vision.num_interactions, setting.resolution) == (int(count), sizes)
        assert setting.first_stage == ("projector", *parts[unfrozen])
        assert [f"{score:.1f}" for score in dataclasses.astuple(setting.scores)] == scores
        counted = published_count(setting.vision, rule="vision tower").total.macs / 1e9
        assert f"{setting.flops_g}G" == flops == f"{int(counted)}G"  # the paper cuts 193.5 to 193
    published = zoo.multimodal("piip_llava_clip_bl_512_256_7b")
    assert CHAT_ABLATIONS["chat_interactions_2"].vision == published.vision


def points(figure):
    return {point for curves in FIGURES[figure].values() for points in curves.values() for point in points}


def test_figures_have_every_printed_point_and_invent_none():
    scored = {
        figure: {point.name for point in points(figure) if point.paper.box_ap or point.published.box_ap}
        for figure in FIGURES
    }
    tsb = {name for name in zoo.names() if name.startswith("piip_tsb_1") and zoo.get(name).head == "mask_rcnn"}
    assert len(tsb) == 3 and all(tsb <= names for names in scored.values())
    assert scored["6"] == {point.name for point in points("6")} and len(scored["6"]) == 11  # the rows of Table I
    deformable = {name for name in ABLATIONS if name.endswith("_deformable") or name == "interactions_0"}
    assert scored["7"] == tsb | deformable - {"interactions_12_deformable"}
    directions = {name for name, setting in ABLATIONS.items() if setting.table == "XVII"}
    assert scored["8"] == tsb | directions - {"direction_adjacent"}
    # those two are PIIP-TSB
    tsb_config = zoo.get("piip_tsb_1120_896_448").config
    assert ABLATIONS["interactions_12_deformable"].config == ABLATIONS["direction_adjacent"].config == tsb_config
    assert {name for figure in FIGURES for name in scored[figure]}.isdisjoint(FIGURE_SETTINGS)


@pytest.mark.parametrize("name", [name for name in FIGURE_SETTINGS if not name.startswith("tbl")])
def test_points_of_figures_differ_from_the_published_model_in_what_their_name_says(name):
    printed, sizes = name.rsplit("_", 3)[0], name.rsplit("_", 3)[1:]
    setting, small = FIGURE_SETTINGS[name], ABLATIONS[printed]
    assert setting.resolution == "/".join(sizes)
    assert setting.config.interaction == small.config.interaction
    assert setting.config.branches == zoo.get(setting.backbone).config.branches
