import pytest
import torch

from piip_core.checkpoints.rules import Change, Rule, RuleTable


def test_a_rule_translates_both_ways():
    rule = Rule("units.*.into_low.ffn.dwconv.*", "unit_*.injector.ffn.dwconv.dwconv.*")
    assert rule.to_published("units.3.into_low.ffn.dwconv.weight") == "unit_3.injector.ffn.dwconv.dwconv.weight"
    assert rule.to_ours("unit_3.injector.ffn.dwconv.dwconv.weight") == "units.3.into_low.ffn.dwconv.weight"


def test_a_star_is_exactly_one_component():
    rule = Rule("attn.*.*", "attn.*.*")
    assert rule.to_ours("attn.proj.weight") == "attn.proj.weight"
    assert rule.to_ours("attn.proj") is None
    assert rule.to_ours("attn.proj.inner.weight") is None


def test_dots_are_no_wildcards():
    assert Rule("a.b", "a.b").to_ours("aXb") is None


def test_sides_must_agree_on_the_stars():
    with pytest.raises(ValueError, match="same number"):
        Rule("a.*", "b")


def test_the_first_rule_that_knows_a_name_decides():
    table = RuleTable([Rule("x.*", "special.*"), Rule("y.*", "special.*")])
    assert table.to_ours("special.weight")[0] == "x.weight"
    assert table.to_ours("other.weight") is None


def test_the_position_slot_comes_and_goes():
    table = torch.randn(1, 5, 3)
    ours = Change.POSITION_SLOT.to_ours(table)
    assert torch.equal(ours, table[:, 1:])
    back = Change.POSITION_SLOT.to_published(ours)
    assert torch.equal(back[:, 1:], ours) and back[:, 0].abs().sum() == 0
