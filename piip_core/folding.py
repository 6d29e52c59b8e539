"""Linear layers that follow each other, computed in one: a product of weights instead of one of feature maps.

Exact but for rounding, in training too, because gradients flow through the product to each of the weights. It needs the
weights without a call of the module that holds them. Where such a call would do more (DeepSpeed's ZeRO-3 gathers
weights in hooks, LoRA replaces linears), the modules are called one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Deconvolution", "is_bare", "observer", "scaled_linear", "without_autocast"]

Hook = TypeVar("Hook", bound=Callable)

_CHUNK = 1 << 22  # elements of the gradient that are rearranged at a time: little memory, and still large products


def observer(hook: Hook) -> Hook:
    """Marks a forward hook that may be left out where a module is not called, for it just looks on."""
    hook.observes = True
    return hook


def is_bare(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether it is of just this kind, and to use its parameters is all that a call would do.

    PyTorch has no public way to ask a module for its hooks. Seen working with torch 2.10 to 2.14.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return type(module) is kind and all(getattr(hook, "observes", False) for hook in hooks)


def scaled_linear(linear: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    """scale * linear(x), (..., C) to (..., D) with a scale (D,); None for 1.

    With the scale in the weights, neither the result nor its gradient is multiplied, and autograd does not keep it.
    """
    if scale is None:
        return linear(x)
    if not is_bare(linear):
        return linear(x) * scale
    bias = None if linear.bias is None else linear.bias * scale
    return F.linear(x, linear.weight * scale[:, None], bias)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turns autocast off."""
    # the meta device, on which FLOPs are counted, has no autocast to turn off
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class Deconvolution(nn.ConvTranspose2d):
    """Transposed convolution whose windows touch but do not overlap: kernel size and stride are the same.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        factor: By which a map grows.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__(in_channels, out_channels, factor, stride=factor)

    def forward(self, x: Tensor, lateral: nn.Conv2d | None = None) -> Tensor:
        """(B, C, H, W) to (B, D, factor * H, factor * W).

        With `lateral`, a 1x1 convolution from D to E channels, it gives (B, E, ...): what that makes of the map, which
        itself never exists.
        """
        if lateral is None:
            return deconvolve(x, self.weight, self.bias)
        return deconvolve(x, *self._joined(lateral))

    def _joined(self, lateral: nn.Conv2d) -> tuple[Tensor, Tensor]:
        if (lateral.kernel_size, lateral.stride, lateral.padding, lateral.groups) != ((1, 1), (1, 1), (0, 0), 1):
            raise ValueError(f"expected a plain 1x1 convolution behind {self}, got {lateral}")
        with without_autocast(self.weight.device):
            mixing = lateral.weight.flatten(1)
            # small matrices; in 16 bits their product would be rounded once more inside
            dtype = torch.promote_types(mixing.dtype, torch.float32)
            weight = torch.einsum("icyx,oc->ioyx", self.weight.to(dtype), mixing.to(dtype))
            bias = mixing.to(dtype) @ self.bias.to(dtype)
            if lateral.bias is not None:
                bias = bias + lateral.bias
        return weight.to(mixing.dtype), bias.to(mixing.dtype)


def deconvolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Transposed convolution of (B, C, H, W) with a weight (C, D, k, k) at stride k."""
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.conv_transpose2d(x, weight, bias, stride=weight.shape[-1])
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight, bias))
    return _Deconvolve.apply(x, weight, bias)


class _Deconvolve(torch.autograd.Function):
    """PyTorch's own, but for the gradient of the weight: oneDNN takes 3 to 4 times as long for it as the matrix product
    that it is where windows do not overlap."""

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
