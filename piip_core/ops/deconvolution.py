"""Transposed convolutions whose windows do not overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Deconvolution(nn.ConvTranspose2d):
    """Transposed convolution whose windows touch but do not overlap: kernel size and stride are `factor`."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__(in_channels, out_channels, factor, stride=factor)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the one output size that there is
        """(B, C, H, W) to (B, D, factor * H, factor * W)."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad and not torch.jit.is_tracing()
        if x.device.type != "cpu" or not trains:
            return F.conv_transpose2d(x, self.weight, self.bias, stride=self.stride)
        # The same as a matrix product: oneDNN takes 3 to 4 times as long for the gradient of a deconvolution's weight
        factor = self.stride[0]
        kernel = self.weight.permute(1, 2, 3, 0).flatten(0, 2)[..., None, None]
        return F.pixel_shuffle(F.conv2d(x, kernel, self.bias.repeat_interleave(factor**2)), factor)


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
