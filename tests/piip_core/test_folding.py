"""Layers computed in one, against the same one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from piip_core.folding import Deconvolution, is_bare, observer, scaled_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def gradients(function, *inputs):
    """Result and gradients, from another gradient for every element of the result."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*inputs)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return [result, *torch.autograd.grad((result * weights).sum(), inputs)]


def assert_as_in_float64(function, reference, inputs, dtype):
    found = gradients(function, *(tensor.to(dtype) for tensor in inputs))
    expected = gradients(reference, *(tensor.to(dtype).double() for tensor in inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_deconvolution_and_its_gradients(monkeypatch, dtype, factor, channels_last, chunk):
    monkeypatch.setattr("piip_core.folding._CHUNK", chunk)
    layer = Deconvolution(6, 5, factor)
    image = torch.randn(2, 6, 3, 4)
    image = image.contiguous(memory_format=torch.channels_last) if channels_last else image

    def ours(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    def reference(x, weight, bias):
        return F.conv_transpose2d(x, weight, bias, stride=factor)

    assert_as_in_float64(ours, reference, (image, layer.weight, layer.bias), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_deconvolution_with_a_lateral_behind_it(dtype, bias):
    layer, lateral = Deconvolution(6, 8), nn.Conv2d(8, 5, 1, bias=bias)
    names = [f"0.{name}" for name in ("weight", "bias")] + [f"1.{name}" for name, _ in lateral.named_parameters()]
    both, one_by_one = nn.ModuleList([layer, lateral]), nn.Sequential(layer, lateral)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = both

        def forward(self, x):
            return self.layers[0](x, self.layers[1])

    def ours(x, *parameters):
        named = {f"layers.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Joined(), named, x)

    def reference(x, *parameters):
        return torch.func.functional_call(one_by_one, dict(zip(names, parameters, strict=True)), x)

    assert_as_in_float64(ours, reference, (torch.randn(2, 6, 3, 4), *both.parameters()), dtype)


def test_under_autocast():
    layer, lateral, x = Deconvolution(64, 48), nn.Conv2d(48, 32, 1), torch.randn(1, 64, 4, 4)
    expected = gradients(lambda x: lateral(layer(x)), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda x: layer(x, lateral), x)
        alone = layer(x)
    assert found[0].dtype == alone.dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_other_convolutions_are_refused():
    with pytest.raises(ValueError, match="expected a plain 1x1 convolution"):
        Deconvolution(6, 8)(torch.randn(1, 6, 3, 3), nn.Conv2d(8, 5, 3, padding=1))


def test_compiles_in_one_graph():
    layer, lateral = Deconvolution(6, 8), nn.Conv2d(8, 5, 1)
    x = torch.randn(1, 6, 3, 4)
    expected = gradients(lambda x: layer(x, lateral), x)
    compiled = torch.compile(lambda x: layer(x, lateral), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scaled_linear_and_its_gradients(dtype, bias):
    linear = nn.Linear(6, 4, bias=bias)
    names = [name for name, _ in linear.named_parameters()]

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x, scale):
            return scaled_linear(self.linear, x, scale)

    def ours(x, scale, *parameters):
        named = {f"linear.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Scaled(), named, (x, scale))

    def reference(x, scale, *parameters):
        return F.linear(x, *parameters) * scale

    inputs = (torch.randn(2, 3, 5, 6), torch.randn(4), *linear.parameters())
    assert_as_in_float64(ours, reference, inputs, dtype)
    assert torch.equal(scaled_linear(linear, inputs[0], None), linear(inputs[0]))


def test_autograd_keeps_no_result_of_a_scaled_linear():
    linear, kept = nn.Linear(6, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        scaled_linear(linear, torch.randn(7, 6, requires_grad=True), torch.randn(4, requires_grad=True))
    assert (7, 6) in kept and (7, 4) not in kept


@pytest.mark.parametrize("change", ["hook", "wrapped"])
def test_linears_that_do_more_are_called(change):
    linear, calls = nn.Linear(6, 4), []
    x, scale = torch.randn(3, 6), torch.randn(4)
    expected = linear(x) * scale
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    linear = linear if change == "hook" else nn.Sequential(linear)
    torch.testing.assert_close(scaled_linear(linear, x, scale), expected)
    assert calls == [1]


def test_counters_of_flops_count_as_nobody():
    linear = nn.Linear(6, 4)
    linear.register_forward_hook(observer(lambda *_: None))
    assert is_bare(linear)
    linear.register_forward_hook(lambda *_: None)
    assert not is_bare(linear) and not is_bare(nn.Sequential(linear)) and not is_bare(nn.Conv2d(1, 1, 1))
    assert is_bare(nn.Conv2d(1, 1, 1), nn.Conv2d)


def test_joined_layers_cost_less():
    layer, lateral, x = Deconvolution(32, 32), nn.Conv2d(32, 8, 1), torch.randn(1, 32, 16, 16)
    counts = []
    for function in (lambda: layer(x, lateral), lambda: lateral(layer(x))):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.35 * counts[1]
