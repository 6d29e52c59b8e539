"""Linears on oneDNN.

On its own PyTorch multiplies float32 matrices on CPUs with the BLAS it was built with, usually Intel's MKL. On one core
of an AMD EPYC (Zen 5) MKL reached 100 GFLOP/s and oneDNN 220; on an Intel Xeon both reach the same. Convolutions run on
oneDNN, and a linear is a convolution with 1x1 kernels. In bfloat16 PyTorch takes oneDNN anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OneDNNLinear", "use_onednn_linears"]


class OneDNNLinear(nn.Linear):
    """A linear for inference: in float32 on oneDNN where PyTorch has it, as any other linear otherwise.

    Args:
        linear: Whose parameters it shares.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training

    def forward(self, input: Tensor) -> Tensor:
        """Like any linear, (..., C) to (..., D)."""
        if torch.compiler.is_compiling():  # the compiler chooses for itself, and exported programs stay standard
            return super().forward(input)
        float32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        here = input.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if not here or not float32 or not input.numel():
            return super().forward(input)
        column = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # channels last in memory
        result = F.conv2d(column, self.weight[:, :, None, None], self.bias)
        return result.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def use_onednn_linears(model: nn.Module) -> None:
    """Replaces the linears of a model."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, OneDNNLinear(module))
