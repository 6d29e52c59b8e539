"""The same computation by others: grid_sample in PyTorch, and whatever other implementation can be imported."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from piip_core.errors import UserError

__all__ = ["BASELINES", "Attend", "find_baselines", "load_baseline", "usual_formulation"]

Attend = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]
"""Takes value (B, S, M, D), (H, W) of every level, locations and weights as `ms_deform_attn` does."""


def usual_formulation(
    value: Tensor, value_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention as it is usually written in PyTorch, in the dtype of its inputs."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    sampled = []
    for level, maps in enumerate(value.split([height * width_ for height, width_ in value_shapes], dim=1)):
        image = maps.permute(0, 2, 3, 1).reshape(batch * heads, width, *value_shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    output = (torch.cat(sampled, dim=-1) * weights).sum(-1)
    return output.view(batch, heads * width, queries).transpose(1, 2).contiguous()


def find_baselines(device: str) -> list[str]:
    """Which of `BASELINES` are installed and run on the device."""
    cuda = torch.device(device).type == "cuda"
    installed = {name for name, (module, _, _) in BASELINES.items() if importlib.util.find_spec(module)}
    return [name for name, (_, only_cuda, _) in BASELINES.items() if name in installed and (cuda or not only_cuda)]


def load_baseline(name: str) -> Attend:
    """One of `BASELINES`.

    Raises:
        UserError: If it cannot be imported.
    """
    module, _, load = BASELINES[name]
    try:
        return load()
    except ImportError as error:
        raise UserError(f"--baselines {name}: expected an importable module {module} ({error})") from error


def _load_transformers() -> Attend:
    """The module that the models of transformers use: grid_sample."""
    modeling = importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    attend = modeling.MultiScaleDeformableAttention()

    def call(value: Tensor, value_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        sizes, start = _level_tensors(tuple(value_shapes), value.device)
        return attend(value, sizes, list(value_shapes), start, locations, weights, 64)

    return call


def _load_mmcv() -> Attend:
    """mmcv's CUDA kernels, its grid_sample on the CPU."""
    ops = importlib.import_module("mmcv.ops.multi_scale_deform_attn")

    def call(value: Tensor, value_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        sizes, start = _level_tensors(tuple(value_shapes), value.device)
        if not value.is_cuda:
            return ops.multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)
        return ops.MultiScaleDeformableAttnFunction.apply(value, sizes, start, locations, weights, len(value))

    return call


def _load_original() -> Attend:
    """The CUDA extension of Deformable DETR, which knows float32 and float64 only: 16-bit values are converted."""
    extension = importlib.import_module("MultiScaleDeformableAttention")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            ctx.save_for_backward(*inputs)
            return extension.ms_deform_attn_forward(*inputs, len(inputs[0]))

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            value, locations, weights = extension.ms_deform_attn_backward(
                *inputs, grad_output.contiguous(), len(inputs[0])
            )
            return value, None, None, locations, weights

    def call(value: Tensor, value_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        sizes, start = _level_tensors(tuple(value_shapes), value.device)
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        output = Function.apply(value.to(dtype), sizes, start, locations.to(dtype), weights.to(dtype))
        return output.to(value.dtype)

    return call


@cache
def _level_tensors(value_shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes and start indices of the levels, made once as models make them once for all layers."""
    sizes = torch.tensor(value_shapes, device=device)
    return sizes, torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))


BASELINES: dict[str, tuple[str, bool, Callable[[], Attend]]] = {
    "transformers": ("transformers", False, _load_transformers),
    "mmcv": ("mmcv", False, _load_mmcv),
    "deformable-detr": ("MultiScaleDeformableAttention", True, _load_original),
}
"""Other implementations by name: the module they come from, whether they need CUDA, what loads them."""
