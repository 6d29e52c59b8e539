"""Models for inference only: weights that follow each other with nothing between them become one.

Everything here is exact but for the rounding of the new weights, which are computed in float64.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .branches.transformer import TransformerBranch
from .errors import UserError
from .interaction import ConvFFN, CrossAttention, DeformableCrossAttention, Injection
from .pyramid import PIIP

Model = TypeVar("Model", bound=nn.Module)

_FOLDED = {  # linears whose weights change or go into others, the last one last
    DeformableCrossAttention: ("sampling_offsets", "attention_weights", "output_proj"),
    CrossAttention: ("proj",),
    ConvFFN: ("fc2",),
    Attention: ("proj",),
    Mlp: ("fc2",),
}


def prepare_for_inference(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Makes a trained model faster, in place. It cannot be trained any more, and its state dict has other names.

    - Offsets and logits of deformable attention come from one linear; the residual scales of interactions
      (`attn_gamma`, `ffn_gamma`) and of blocks (layer scale) are part of the weights before them; so are the lateral
      convolutions of a `PIIPFPN`, whose widest maps then never exist.
    - Position embeddings are resized once per image size.
    - On CPUs, float32 linears run on oneDNN. PyTorch's own choice is MKL, which takes twice the time on processors of
      other makers than Intel.

    Args:
        model: With a `PIIP` inside: `DensePIIP`, `PIIPClassifier` or a network around one. It is set to evaluation mode
            and its parameters need no gradients any more. A second time changes nothing more.
        dtype: To cast floating parameters and buffers to afterwards; folding before a cast loses less.

    Linears are replaced by others, without their hooks.

    Returns:
        The model.

    Raises:
        UserError: If there is no PIIP in the model, or something has replaced one of its linears or what that computes
            (adapters that are not merged, parametrisations, offloading, sharding).
    """
    pyramids = [module for module in model.modules() if isinstance(module, PIIP)]
    if not pyramids:
        raise UserError(f"prepare_for_inference: expected a model with a PIIP inside, got a {type(model).__name__}")
    pyramids = [pyramid for pyramid in pyramids if not pyramid.inference_only]
    for pyramid in pyramids:
        _check_linears(pyramid)
    model.requires_grad_(False)
    for pyramid in pyramids:
        _fold(pyramid)
        for name, module in list(pyramid.named_modules()):
            if type(module) is nn.Linear:
                pyramid.set_submodule(name, OneDNNLinear(module))
        pyramid.inference_only = True
    for module in model.modules():
        getattr(module, "fold_for_inference", lambda: None)()
    return model.eval() if dtype is None else model.eval().to(dtype)


def _check_linears(pyramid: PIIP) -> None:
    for name, module in pyramid.named_modules():
        for path in _folded_linears(module):
            linear = getattr(module, path)
            weight = getattr(linear, "weight", None)
            replaced = type(linear) is not nn.Linear or "forward" in vars(linear)
            if replaced or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
                raise UserError(
                    f"prepare_for_inference: {name}.{path} is a {type(linear).__name__} whose weights are not all that "
                    "it computes with: expected a plain linear. Merge adapters, remove parametrisations and hooks of "
                    "other libraries, or load the whole model on one device first"
                )


def _folded_linears(module: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _FOLDED.items() if isinstance(module, kind)), ())


def _fold(pyramid: PIIP) -> None:
    for module in list(pyramid.modules()):
        if isinstance(module, Injection):
            for name, before in (("attn_gamma", module.attn), ("ffn_gamma", module.ffn)):
                if before is not None:
                    _scale_output(before, getattr(module, name))
                    setattr(module, name, None)
        elif isinstance(module, DeformableCrossAttention):
            module.sampling_linear = _join(module.sampling_offsets, module.attention_weights)
        elif isinstance(module, Block) and isinstance(module.attn, Attention) and isinstance(module.mlp, Mlp):
            for name, before in (("ls1", module.attn), ("ls2", module.mlp)):
                scale = getattr(module, name)
                if isinstance(scale, LayerScale):
                    _scale_output(before, scale.gamma)
                    setattr(module, name, nn.Identity())
        elif isinstance(module, TransformerBranch):
            module.keep_positions = True


def _join(*linears: nn.Linear) -> nn.Linear:
    """One linear for several of the same input; the others stay, for `MSDeformAttn.sampling`."""
    weight, bias = torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    joined.weight, joined.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return joined


@torch.no_grad()
def _scale_output(module: nn.Module, scale: Tensor) -> None:
    linear = getattr(module, _folded_linears(module)[-1])
    for parameter, factor in ((linear.weight, scale[:, None]), (linear.bias, scale)):
        if parameter is not None:
            parameter.copy_(parameter.double() * factor.double())


class OneDNNLinear(nn.Linear):
    """A linear for inference: in float32 on oneDNN where PyTorch has it, as any other linear otherwise.

    On its own PyTorch multiplies float32 matrices on CPUs with the BLAS it was built with, usually Intel's MKL. On one
    core of an AMD EPYC (Zen 5) MKL reached 100 GFLOP/s and oneDNN 220; on an Intel Xeon both reach the same.
    Convolutions run on oneDNN, and a linear is a convolution with 1x1 kernels. In bfloat16 PyTorch takes oneDNN anyway.

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
