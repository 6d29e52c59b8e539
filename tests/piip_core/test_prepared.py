"""Models prepared for inference against the same models before."""

import copy

import pytest
import torch
from torch import nn

from piip_core import (
    PIIP,
    BranchConfig,
    DensePIIP,
    InteractionConfig,
    PIIPConfig,
    TimmConfig,
    UserError,
    prepare_for_inference,
)
from piip_core.prepared import OneDNNLinear


@pytest.mark.parametrize("attention", ["deformable", "regular"])
@pytest.mark.parametrize("ffn", [True, False])
def test_computes_the_same(tiny_config, randomize, attention, ffn):
    interaction = InteractionConfig(num_interactions=2, num_heads=4, attention=attention, ffn=ffn)
    model = randomize(DensePIIP(tiny_config(window_size=3, interaction=interaction))).eval()
    prepared = prepare_for_inference(copy.deepcopy(model))
    for size in ((96, 128), (100, 171), (96, 128)):
        image = torch.randn(2, 3, *size)
        for expected, actual in zip(model(image), prepared(image), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_base_patch16_radio_v3", "vit_small_patch16_dinov3"])
def test_networks_of_timm_compute_the_same(name, randomize):
    options = {"depth": 2, "embed_dim": 32, "num_heads": 4, "init_values": 0.5}
    network = TimmConfig(name=name, options=options)
    branches = [BranchConfig(network=network, image_size=size, window_size=(3, None)) for size in (64, 96)]
    config = PIIPConfig(branches=branches, interaction=InteractionConfig(num_interactions=2, num_heads=4), merging=None)
    model, image = randomize(PIIP(config)).eval(), torch.randn(2, 3, 96, 128)
    prepared = prepare_for_inference(copy.deepcopy(model))
    torch.testing.assert_close(prepared(image), model(image), rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_as_close_as_the_model_itself(tiny_model):
    image = torch.randn(1, 3, 96, 128)
    expected = tiny_model(image)
    half = copy.deepcopy(tiny_model).bfloat16()(image.bfloat16())
    prepared = prepare_for_inference(copy.deepcopy(tiny_model), dtype=torch.bfloat16)(image.bfloat16())
    for e, h, p in zip(expected, half, prepared, strict=True):
        assert p.dtype == torch.bfloat16
        assert (p.float() - e).norm() < 1.3 * (h.float() - e).norm()


def test_works_under_autocast_and_in_one_graph(tiny_config, randomize):
    interaction = InteractionConfig(num_interactions=1, num_heads=4)
    config = tiny_config(dims=(32, 16), sizes=(64, 128), depth=1, window_size=3, interaction=interaction)
    model, image = randomize(DensePIIP(config)).eval(), torch.randn(1, 3, 96, 128)
    expected = model(image)
    prepared = prepare_for_inference(model)
    with torch.autocast("cpu", torch.bfloat16):
        halves = prepared(image)
    compiled = torch.compile(prepared, fullgraph=True, backend="eager")(image)
    for e, h, c in zip(expected, halves, compiled, strict=True):
        assert (h.float() - e).abs().max() < 0.06 * e.abs().max()
        torch.testing.assert_close(c, e, rtol=1e-4, atol=1e-4)


def test_a_second_time_changes_nothing(tiny_model):
    image = torch.randn(1, 3, 96, 128)
    once = prepare_for_inference(tiny_model)(image)
    twice = prepare_for_inference(tiny_model)(image)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_refuses_training_and_other_models(tiny_model):
    model = nn.Sequential(prepare_for_inference(tiny_model))
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model[0].modules())
    with pytest.raises(UserError, match="prepare_for_inference cannot be trained"):
        model.train()
    model.eval()
    with pytest.raises(UserError, match="expected a model with a PIIP inside, got a Linear"):
        prepare_for_inference(nn.Linear(2, 2))


def test_positions_are_computed_once_per_size(tiny_config, randomize, monkeypatch):
    from piip_core.branches import transformer

    sizes = []
    original = transformer.resize_position_grid
    monkeypatch.setattr(
        transformer, "resize_position_grid", lambda grid, *size: (sizes.append(size), original(grid, *size))[1]
    )
    model = randomize(DensePIIP(tiny_config(dims=(32,), sizes=(128,)))).eval()
    image = torch.randn(1, 3, 96, 128)
    model(image), model(image)
    assert sizes == [(6, 8)] * 2  # weights may have changed
    prepare_for_inference(model)
    model(image), model(image), model(torch.randn(1, 3, 64, 64)), model(image)
    assert sizes[2:] == [(6, 8), (4, 4)]


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_linears(shape, bias):
    plain = nn.Linear(24, 10, bias=bias)
    model = OneDNNLinear(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(*shape)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x.flip(0)[..., ::1]), plain(x.flip(0)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.double()(x.double()), plain.double()(x.double()))


def replace_forward(linear):
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias)
    return linear


CHANGES = {
    "adapter": lambda linear: nn.Sequential(linear),
    "parametrisation": lambda linear: nn.utils.parametrizations.weight_norm(linear),
    "replaced forward": replace_forward,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "path", ["interactions.0.units.1_2.into_low.attn.attention_weights", "branches.1.model.blocks.0.mlp.fc2"]
)
def test_refuses_linears_that_are_more_than_their_weights(tiny_model, path, change):
    """Folding would leave out what an adapter adds, in silence. Nothing has changed after the error."""
    pyramid, image = tiny_model.pyramid, torch.randn(1, 3, 96, 128)
    pyramid.set_submodule(path, change(pyramid.get_submodule(path)))
    expected = tiny_model(image)
    with pytest.raises(UserError, match=rf"{path} is a .*: expected a plain linear\. Merge adapters"):
        prepare_for_inference(tiny_model)
    assert all(torch.equal(a, b) for a, b in zip(tiny_model(image), expected, strict=True))
