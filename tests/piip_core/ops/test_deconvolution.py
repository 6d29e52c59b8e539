"""Deconvolutions and their gradients against PyTorch's, alone and with a convolution joined."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from piip_core.ops.deconvolution import Deconvolution, join

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


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_deconvolution_and_its_gradients(dtype, factor, channels_last):
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
def test_a_lateral_that_is_joined(dtype, bias):
    layer, lateral = Deconvolution(64, 48).to(dtype), nn.Conv2d(48, 8, 1, bias=bias).to(dtype)
    joined, x = join(layer, lateral), torch.randn(1, 64, 4, 4, dtype=dtype)
    expected = lateral.double()(layer.double()(x.double()))
    assert (joined(x).double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert not any(parameter.requires_grad or parameter.dtype != dtype for parameter in joined.parameters())


def test_under_autocast():
    layer, x = Deconvolution(64, 48), torch.randn(1, 64, 4, 4)
    expected = gradients(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, x)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_compiles_in_one_graph():
    layer, x = Deconvolution(6, 8), torch.randn(1, 6, 3, 4)
    expected = gradients(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
