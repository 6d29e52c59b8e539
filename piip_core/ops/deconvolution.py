"""Transposed convolutions whose windows do not overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 1 << 22  # elements of the gradient that are rearranged at a time: little memory, and still large products


class Deconvolution(nn.ConvTranspose2d):
    """Transposed convolution whose windows touch but do not overlap: kernel size and stride are `factor`."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__(in_channels, out_channels, factor, stride=factor)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, factor * H, factor * W)."""
        weight, bias = self.weight, self.bias
        if x.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
            return F.conv_transpose2d(x, weight, bias, stride=self.stride)
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight, bias))
        return _Deconvolve.apply(x, weight, bias)


@torch.no_grad()
def join(deconvolution: Deconvolution, lateral: nn.Conv2d) -> Deconvolution:
    """One deconvolution for another and the plain 1x1 convolution after it: the wide map between them never exists.

    Its weights are computed in float64 and do not follow changes of the others.
    """
    mixing = lateral.weight.flatten(1).double()
    joined = Deconvolution(deconvolution.in_channels, lateral.out_channels, deconvolution.stride[0])
    joined = joined.to(lateral.weight).requires_grad_(False).train(deconvolution.training)
    joined.weight.copy_(torch.einsum("icyx,oc->ioyx", deconvolution.weight.double(), mixing))
    joined.bias.copy_(mixing @ deconvolution.bias.double() + (0 if lateral.bias is None else lateral.bias.double()))
    return joined


class _Deconvolve(torch.autograd.Function):
    """PyTorch's own, but for the gradient of the weight.

    Where windows do not overlap it is a matrix product, and oneDNN takes 3 to 4 times as long for it as that does.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=weight.shape[-1])

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = F.conv2d(grad, weight, stride=weight.shape[-1]) if ctx.needs_input_grad[0] else None
        return grad_x, _weight_gradient(grad, x, weight), grad.sum((0, 2, 3))


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    factor, (batch, _, height, width) = weight.shape[-1], x.shape
    windows = grad.unflatten(2, (height, factor)).unflatten(4, (width, factor)).permute(0, 2, 4, 3, 5, 1)
    cells = x.permute(0, 2, 3, 1)
    size = weight[0].numel()  # of a window
    lines = max(1, _CHUNK // (size * max(width, 1)))
    total = torch.zeros(weight.shape[0], size, dtype=torch.promote_types(weight.dtype, torch.float32))
    for image in range(batch):
        for first in range(0, height, lines):
            part = slice(first, first + lines)
            of_windows = windows[image, part].flatten(0, 1).flatten(1)
            total += cells[image, part].flatten(0, 1).t() @ of_windows
    return total.unflatten(1, windows.shape[3:]).permute(0, 3, 1, 2).to(weight.dtype)
