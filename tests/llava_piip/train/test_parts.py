"""What is trained: parts by their modules, and the groups of the optimizer."""

import pytest
from torch import nn

from llava_piip.loading import PARTS, part_parameters
from llava_piip.train.building import freeze_except
from llava_piip.train.trainer import parameter_groups
from piip_core.errors import ConfigError

RATES = {"projector": 1e-3, "language_model": 2e-5, "vision_tower": 2e-6}


def test_the_parts_are_the_whole_model_and_share_nothing(tiny_llava):
    model, _ = tiny_llava
    of_parts = [name for part in PARTS for name in part_parameters(model, part)]
    assert sorted(of_parts) == sorted(name for name, _ in model.named_parameters())
    assert "lm_head.weight" in part_parameters(model, "language_model")


def test_interactions_are_what_of_the_tower_is_in_no_branch(tiny_llava):
    model, _ = tiny_llava
    tower = set(part_parameters(model, "vision_tower"))
    branches = {name for name in tower if ".branches." in name}
    interactions = set(part_parameters(model, "interactions"))
    assert interactions == tower - branches and interactions and branches
    freeze_except(model, ["projector", "interactions"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == interactions | set(part_parameters(model, "projector"))
    groups = parameter_groups(model, RATES, 0.0, frozenset())
    assert [(group["part"], len(group["params"])) for group in groups] == [
        ("projector", len(trained - interactions)),
        ("vision_tower", len(interactions)),
    ]


def test_a_model_without_interactions_cannot_train_them(tiny_llava):
    model, _ = tiny_llava
    model.model.vision_tower.pyramid.interactions = nn.ModuleList()
    with pytest.raises(ConfigError, match="train_parts='interactions': expected parts that the model has"):
        freeze_except(model, ["projector", "interactions"])


def test_a_tied_output_layer_counts_once(tiny_llava):
    model, _ = tiny_llava
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    names = part_parameters(model, "language_model")
    assert "model.language_model.embed_tokens.weight" in names and "lm_head.weight" not in names
    groups = parameter_groups(model, RATES, 0.1, frozenset(names))
    assert len({id(p) for group in groups for p in group["params"]}) == sum(len(group["params"]) for group in groups)


def test_an_unknown_part_is_named(tiny_llava):
    with pytest.raises(ConfigError, match="part='vision'"):
        freeze_except(tiny_llava[0], ["vision"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_groups_hold_every_trained_parameter_once_at_the_rate_of_its_part(tiny_llava, decay):
    model, _ = tiny_llava
    freeze_except(model, ["projector", "vision_tower"])
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in parameter_groups(model, RATES, decay, decayed):
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group["lr"], group["weight_decay"], group["part"])
    assert set(seen) == {id(p) for p in model.parameters() if p.requires_grad}
    for key, (rate, weight_decay, part) in seen.items():
        assert rate == RATES[part] and names[key] in part_parameters(model, part)
        assert weight_decay == (decay if names[key] in decayed else 0.0)
