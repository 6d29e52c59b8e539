import pytest
import torch

from piip_core import PIIP, ConfigError, DensePIIP, InteractionConfig, MergingConfig
from piip_core.pyramid import resize_for_branch


def test_resize_uses_the_factor_and_not_the_ratio_of_sides():
    """Published rule, written out in float64: source = (dst + 0.5) / factor - 0.5, clamped at 0, floor sizes."""
    factor, side = 448 / 1344, 50
    image = torch.rand(1, 1, 1, side, dtype=torch.float64).expand(1, 1, side, side)
    out = resize_for_branch(image, factor)
    assert out.shape[-2:] == (16, 16)
    source = ((torch.arange(16, dtype=torch.float64) + 0.5) / factor - 0.5).clamp(min=0)
    left = source.floor().long()
    right = (left + 1).clamp(max=side - 1)
    row = image[0, 0, 0]
    expected = row[left] + (row[right] - row[left]) * (source - left)
    torch.testing.assert_close(out[0, 0, 0], expected)


def test_never_enlarges():
    image = torch.rand(1, 3, 8, 8)
    assert resize_for_branch(image, 1.5) is image


@pytest.mark.parametrize("size", [(96, 128), (128, 128), (100, 171)])
@pytest.mark.parametrize("batch", [1, 2])
def test_shapes(tiny_model, size, batch):
    outputs = tiny_model(torch.randn(batch, 3, *size))
    rows, columns = size[0] // 16, size[1] // 16
    assert [tuple(o.shape) for o in outputs] == [
        (batch, 32, rows * 4, columns * 4),
        (batch, 32, rows * 2, columns * 2),
        (batch, 32, rows, columns),
        (batch, 32, rows // 2, columns // 2),
    ]


def test_a_batch_is_its_images(tiny_model):
    images = torch.randn(3, 3, 96, 128)
    batch = tiny_model(images)
    for i in range(3):
        for together, alone in zip(batch, tiny_model(images[i : i + 1]), strict=True):
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_without_training_interactions_branches_are_independent(tiny_config):
    """Zero gammas: each branch computes what it computes alone, so pretrained features survive."""
    model = PIIP(tiny_config()).eval()
    image = torch.randn(1, 3, 128, 96)
    for branch, factor, actual in zip(model.branches, model.factors, model(image), strict=True):
        alone = branch.run(branch.embed(resize_for_branch(image, factor)), 0, branch.num_blocks).tokens
        torch.testing.assert_close(actual, alone.permute(0, 3, 1, 2))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_number_of_interactions(tiny_config, count):
    """Also more interactions than blocks, and blocks spread over fewer interactions."""
    model = PIIP(tiny_config(interaction=InteractionConfig(num_interactions=count, num_heads=4)))
    assert len(model.interactions) == count
    assert [m.shape[1] for m in model(torch.randn(1, 3, 128, 128))] == [32, 24, 16]


@pytest.mark.parametrize("units", ["adjacent", "alternating", "cycle_down", "cycle_up", "bidirectional_cycle"])
@pytest.mark.parametrize("attention", ["deformable", "regular"])
def test_every_direction_reaches_every_parameter(tiny_config, randomize, units, attention):
    interaction = InteractionConfig(num_interactions=2, num_heads=4, units=units, attention=attention)
    model = randomize(DensePIIP(tiny_config(interaction=interaction))).eval()
    loss = sum(m.square().mean() for m in model(torch.randn(1, 3, 128, 128)))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("branches", [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3)])
def test_out_branches(tiny_config, branches):
    """The branch-merging ablation: any subset gives maps of Branch 1's width on the last branch's grid."""
    model = DensePIIP(tiny_config(merging=MergingConfig(branches=branches)))
    assert model(torch.randn(1, 3, 128, 128))[2].shape == (1, 32, 8, 8)


def test_intermediates_are_tapped_without_altering_the_path(tiny_model):
    image = torch.randn(1, 3, 96, 128)
    final, intermediates = tiny_model.pyramid.forward_intermediates(image, after=(0, 1))
    assert sorted(intermediates) == [0, 1]
    for a, b, c in zip(final, intermediates[1], tiny_model.pyramid(image), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(final[0], intermediates[0][0])


def test_regular_form_makes_a_level_from_each_tap(tiny_config):
    merging = MergingConfig(kind="regular", intermediate_after=(0, 1, 2))
    interaction = InteractionConfig(num_interactions=4, num_heads=4)
    model = DensePIIP(tiny_config(interaction=interaction, merging=merging, depth=4)).eval()
    outputs = model(torch.randn(1, 3, 128, 128))
    assert [o.shape[-1] for o in outputs] == [32, 16, 8, 4]
    _, taps = model.pyramid.forward_intermediates(torch.zeros(1, 3, 128, 128), (0, 1, 2))
    assert len(model.merging.intermediate) == 3 and len(taps) == 3


def test_single_branch(tiny_config):
    config = tiny_config(dims=(32,), sizes=(128,), merging=MergingConfig(kind="single", pyramid_norm="layer"))
    model = DensePIIP(config)
    assert not model.pyramid.interactions and model.merging is None
    assert [o.shape[-1] for o in model(torch.randn(1, 3, 128, 128))] == [32, 16, 8, 4]


def test_dense_model_needs_merging(tiny_config):
    with pytest.raises(ConfigError, match="merging=None"):
        DensePIIP(tiny_config(merging=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights(tiny_model, dtype):
    """Half precision stays close to fp32 and keeps finite gradients."""
    image = torch.randn(1, 3, 96, 128)
    expected = tiny_model(image)
    with torch.autocast("cpu", dtype=dtype):
        actual = tiny_model(image)
        sum(o.float().mean() for o in actual).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny_model.parameters())
    pure = tiny_model.to(dtype)(image.to(dtype))
    for e, a, h in zip(expected, actual, pure, strict=True):
        scale = e.abs().max()
        assert (a.float() - e).abs().max() < 0.06 * scale
        assert h.dtype == dtype and (h.float() - e).abs().max() < 0.06 * scale


@pytest.mark.parametrize("mode", [True, "cheap"])
def test_checkpointing_keeps_the_gradients(tiny_model, mode):
    image = torch.randn(1, 3, 96, 128)

    def gradients(enable):
        tiny_model.zero_grad()
        tiny_model.set_grad_checkpointing(enable)
        sum(o.square().mean() for o in tiny_model(image)).backward()
        return [p.grad.clone() for p in tiny_model.parameters()]

    for expected, actual in zip(gradients(False), gradients(mode), strict=True):
        torch.testing.assert_close(actual, expected)


def test_checkpointing_has_three_modes(tiny_model):
    with pytest.raises(ConfigError, match="grad_checkpointing='most': expected False, True or 'cheap'"):
        tiny_model.set_grad_checkpointing("most")


@pytest.fixture
def two_branches(tiny_config, randomize):
    """The smallest model with every kind of part; tracing it takes seconds."""
    torch.compiler.reset()  # another size than an earlier test's would make sizes symbols, which takes minutes
    interaction = InteractionConfig(num_interactions=1, num_heads=4)
    config = tiny_config(dims=(32, 16), sizes=(64, 128), depth=1, window_size=3, interaction=interaction)
    return randomize(DensePIIP(config)).eval()


def test_cheap_checkpointing_in_one_compiled_graph(two_branches):
    image = torch.randn(1, 3, 64, 64)
    gradients = []
    for mode, model in (
        (False, two_branches),
        ("cheap", torch.compile(two_branches, fullgraph=True, backend="aot_eager")),
    ):
        two_branches.set_grad_checkpointing(mode)
        two_branches.zero_grad()
        sum(o.square().mean() for o in model(image)).backward()
        gradients.append([p.grad.clone() for p in two_branches.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compile_in_one_graph(two_branches):
    compiled = torch.compile(two_branches, fullgraph=True, backend="aot_eager")
    image = torch.randn(1, 3, 96, 128)
    for expected, actual in zip(two_branches(image), compiled(image), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
