import pytest
import torch

from piip_core import ConfigError, InteractionConfig
from piip_core.config import UnitSpec
from piip_core.interaction import (
    ConvFFN,
    CrossAttention,
    Injection,
    Interaction,
    InteractionUnit,
)

CONFIG = InteractionConfig(num_heads=4)


def maps(*shapes, dtype=torch.float32):
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("attention", ["deformable", "regular"])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_a_new_unit_changes_nothing(attention, projection, norm):
    config = InteractionConfig(num_heads=4, attention=attention, projection=projection, norm=norm)
    low, high = maps((3, 4, 32), (6, 9, 16))
    new_low, new_high = InteractionUnit((32, 16), UnitSpec(1, 2), config)(low, high)
    assert torch.equal(new_low, low) and torch.equal(new_high, high)


def test_both_directions_read_the_inputs(randomize):
    unit = randomize(InteractionUnit((32, 16), UnitSpec(1, 2), CONFIG)).eval()
    low, high = maps((3, 4, 32), (6, 8, 16))
    new_low, new_high = unit(low, high)
    torch.testing.assert_close(new_low, unit.into_low(low, high))
    torch.testing.assert_close(new_high, unit.into_high(high, low))
    assert not torch.allclose(unit.into_high(high, new_low), new_high)


def test_one_way_units_leave_the_source_alone(randomize):
    unit = randomize(InteractionUnit((32, 16), UnitSpec(1, 2, into_high=False), CONFIG)).eval()
    low, high = maps((3, 4, 32), (6, 8, 16))
    new_low, new_high = unit(low, high)
    assert new_high is high and not torch.allclose(new_low, low)
    assert all(name.startswith("into_low") for name, _ in unit.named_parameters())


def test_units_run_in_order(randomize):
    """The second unit sees what the first wrote."""
    specs = [UnitSpec(2, 3), UnitSpec(1, 2)]
    interaction = randomize(Interaction([32, 24, 16], specs, CONFIG)).eval()
    before = maps((2, 2, 32), (3, 3, 24), (4, 4, 16))
    after = interaction(before)
    middle, last = interaction.units["2_3"](before[1], before[2])
    first, middle = interaction.units["1_2"](before[0], middle)
    for expected, actual in zip((first, middle, last), after, strict=True):
        torch.testing.assert_close(actual, expected)


def test_regular_attention_equals_torch(randomize):
    attention = randomize(CrossAttention(16, 24, 4))
    reference = torch.nn.MultiheadAttention(16, 4, bias=False, kdim=24, vdim=24, batch_first=True)
    reference.q_proj_weight, reference.k_proj_weight = attention.wq.weight, attention.wk.weight
    reference.v_proj_weight = attention.wv.weight
    reference.out_proj = attention.proj
    query, value = maps((3, 4, 16), (5, 2, 24))
    q, v = query.flatten(1, 2), value.flatten(1, 2)
    expected = reference(q, v, v, need_weights=False)[0].view_as(query)
    torch.testing.assert_close(attention(query, value), expected, rtol=1e-5, atol=1e-5)


def test_regular_attention_names_a_wrong_number_of_heads():
    with pytest.raises(ConfigError, match="num_heads=5"):
        CrossAttention(16, 16, 5)


def test_ffn_mixes_only_neighbours(randomize):
    ffn = randomize(ConvFFN(16, 8))
    x = torch.randn(1, 6, 6, 16)
    moved = x.clone()
    moved[0, 0, 0] += 1
    changed = (ffn(moved) - ffn(x)).abs().amax(-1)[0] > 1e-6
    assert changed[:2, :2].all() and not changed[2:].any() and not changed[:, 2:].any()


def test_residuals_are_those_of_equations_1_and_2(randomize):
    """In float64, where the fused product and sum would show any other difference."""
    injection = randomize(Injection(32, 16, CONFIG)).double().eval()
    query, value = maps((3, 4, 32), (6, 8, 16), dtype=torch.float64)
    attended = injection.attn(injection.query_norm(query), injection.value_norm(injection.proj(value)))
    middle = query + injection.attn_gamma * attended
    expected = middle + injection.ffn_gamma * injection.ffn(injection.ffn_norm(middle))
    torch.testing.assert_close(injection(query, value), expected, rtol=1e-12, atol=1e-12)


def test_drop_path_is_on_the_ffn_only(randomize):
    injection = randomize(Injection(32, 16, InteractionConfig(num_heads=4, drop_path_rate=0.999999))).train()
    query, value = maps((3, 4, 32), (6, 8, 16))
    without_ffn = query + injection.attn_gamma * injection.attn(
        injection.query_norm(query), injection.value_norm(injection.proj(value))
    )
    torch.testing.assert_close(injection(query, value), without_ffn)


def test_without_ffn(randomize):
    injection = randomize(Injection(32, 16, InteractionConfig(num_heads=4, ffn=False)))
    assert not any("ffn" in name for name, _ in injection.named_parameters())
    query, value = maps((3, 4, 32), (6, 8, 16))
    assert injection(query, value).shape == query.shape
