import json

import pytest

from piip_core import BranchConfig, ConfigError, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig
from piip_core.config import UnitSpec, even_segments

NETWORK = ViTConfig(embed_dim=32, depth=4, num_heads=4)


def test_json_round_trip(tiny_config):
    config = tiny_config(window_size=(3, None), merging=MergingConfig(branches=(1, 3)))
    assert PIIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_lists_and_tuples_are_equal():
    as_list = BranchConfig(network=NETWORK, image_size=64, segments=[[0, 1], [2, 3]], window_size=[2, 2, None, 2])
    as_tuple = BranchConfig(network=NETWORK, image_size=64, segments=((0, 1), (2, 3)), window_size=(2, 2, None, 2))
    assert as_list == as_tuple and hash(as_list) == hash(as_tuple)


@pytest.mark.parametrize("depth, count", [(24, 12), (12, 12), (12, 5), (2, 3), (4, 1), (7, 0)])
def test_even_segments_cover_every_block_once(depth, count):
    segments = even_segments(depth, count)
    assert len(segments) == count
    assert [i for a, b in segments for i in range(a, b + 1)] == (list(range(depth)) if count else [])


@pytest.mark.parametrize(
    "text, unit",
    [
        ("2<->3", UnitSpec(2, 3)),
        ("3<->2", UnitSpec(2, 3)),
        ("3->2", UnitSpec(2, 3, into_low=True, into_high=False)),
        ("2<-3", UnitSpec(2, 3, into_low=True, into_high=False)),
        (" 1 -> 3", UnitSpec(1, 3, into_low=False, into_high=True)),
    ],
)
def test_unit_notation(text, unit):
    assert UnitSpec.parse(text) == unit


def test_adjacent_units_run_from_the_high_resolution_end():
    units = InteractionConfig().graph(0, 4)
    assert [(u.low, u.high) for u in units] == [(3, 4), (2, 3), (1, 2)]
    assert all(u.into_low and u.into_high for u in units)


@pytest.mark.parametrize(
    "preset, directions", [("adjacent", 4), ("alternating", 2), ("cycle_down", 3), ("cycle_up", 3)]
)
def test_presets_have_the_directions_of_table_xvii(preset, directions):
    for k in range(2):
        units = InteractionConfig(units=preset).graph(k, 3)
        assert sum(u.into_low + u.into_high for u in units) == directions


def test_patterns_cycle_over_interactions():
    config = InteractionConfig(units=[["2->1"], ["1->2"]])
    assert [config.graph(k, 2)[0].into_low for k in range(3)] == [True, False, True]


BROKEN = [
    (lambda config, branch: ViTConfig(embed_dim=30, depth=2, num_heads=4), "num_heads=4"),
    (lambda config, branch: ViTConfig(embed_dim=32, depth=0, num_heads=4), "depth=0"),
    (lambda config, branch: BranchConfig(network="deit", image_size=64), "network='deit'"),
    (lambda config, branch: BranchConfig(network=NETWORK, image_size=64, segments=[[0, 1], [3, 3]]), "blocks 0 to 3"),
    (lambda config, branch: BranchConfig(network=NETWORK, image_size=64, window_size=[3, 3]), "4 entries"),
    (lambda config, branch: BranchConfig(network=NETWORK, image_size=64, window_size=0), "window_size=0"),
    (lambda config, branch: BranchConfig(network=NETWORK, image_size=64, drop_path_rate=1.0), "drop_path_rate=1.0"),
    (
        lambda config, branch: BranchConfig(
            network=ViTConfig(embed_dim=32, depth=4, num_heads=4, class_token=True), image_size=64, window_size=3
        ),
        "class_token",
    ),
    (lambda config, branch: config(interaction=InteractionConfig(units="ring")), "units='ring'"),
    (lambda config, branch: config(interaction=InteractionConfig(units=("2~3",))), "2~3"),
    (lambda config, branch: config(interaction=InteractionConfig(units=("3<->4",))), "branch numbers from 1 to 3"),
    (lambda config, branch: config(interaction=InteractionConfig(units=("1->2", "2->1"))), "at most once"),
    (lambda config, branch: config(interaction=InteractionConfig(attention="dense")), "attention='dense'"),
    (lambda config, branch: config(merging=MergingConfig(branches=(0, 1))), "numbers from 1 to 3"),
    (lambda config, branch: config(merging=MergingConfig(branches=())), "branches=()"),
    (lambda config, branch: config(merging=MergingConfig(kind="single")), "kind='single'"),
    (lambda config, branch: MergingConfig(kind="regular"), "3 interactions"),
    (lambda config, branch: PIIPConfig(branches=()), "at least one branch"),
    (lambda config, branch: PIIPConfig(branches=(branch(32, 64, segments=[[0, 1]]), branch(16, 96))), "12 segments"),
    (lambda config, branch: PIIPConfig.from_dict({"branches": [], "depth": 3}), "depth"),
    (
        lambda config, branch: PIIPConfig.from_dict({"branches": [{"network": {"family": "vit"}}]}),
        "embed_dim",
    ),
    (
        lambda config, branch: PIIPConfig.from_dict({"branches": [{"network": {"family": "x"}}]}),
        "family='x'",
    ),
]


@pytest.mark.parametrize("build, names", BROKEN, ids=[names for _, names in BROKEN])
def test_errors_name_field_and_value(build, names, tiny_config, tiny_branch):
    with pytest.raises(ConfigError) as error:
        build(tiny_config, tiny_branch)
    assert names in str(error.value)
