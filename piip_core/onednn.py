"""Linears on oneDNN with the GELU behind them, by the operator that torch.compile emits.

On its own PyTorch multiplies float32 matrices on CPUs with the BLAS it was built with, usually Intel's MKL. On one core
of an AMD EPYC (Zen 5) MKL reached 100 GFLOP/s and oneDNN 220. In bfloat16 PyTorch takes oneDNN anyway, by a slightly
slower way.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

__all__ = ["OneDNNLinear", "use_onednn_linears"]


def _supported_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


_DTYPES = _supported_dtypes()


class OneDNNLinear(nn.Linear):
    """A linear for inference: on oneDNN where PyTorch and the CPU can, as any other linear otherwise.

    Args:
        linear: Whose parameters it shares.
        gelu: Apply an exact GELU to the result, in the same pass.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.gelu = gelu
        self.training = linear.training

    def forward(self, input: Tensor) -> Tensor:
        cast = torch.is_autocast_enabled("cpu") or input.dtype != self.weight.dtype
        traced = torch.compiler.is_compiling()  # the compiler chooses for itself, and exported programs stay standard
        if input.device.type == "cpu" and input.dtype in _DTYPES and not cast and not traced:
            activation = ("gelu", [], "none") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, *activation)
        result = super().forward(input)
        return nn.functional.gelu(result) if self.gelu else result

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


def use_onednn_linears(model: nn.Module) -> None:
    """Replaces the linears of a model, and those GELUs of timm's MLPs that directly follow one."""
    for module in list(model.modules()):
        if isinstance(module, Mlp) and _is_plain(module):
            module.fc1, module.act = OneDNNLinear(module.fc1, gelu=True), nn.Identity()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, OneDNNLinear(module))


def _is_plain(mlp: Mlp) -> bool:
    return type(mlp.fc1) is nn.Linear and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
