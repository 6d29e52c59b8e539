"""The straightforward formulation of a backbone, to measure what its optimisations are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from piip_core.branches.transformer import TransformerBranch
from piip_core.interaction import DeformableCrossAttention
from piip_core.merging import BranchMerging, FeaturePyramid
from piip_core.ops import make_reference_points, ms_deform_attn_reference
from piip_core.ops.deconvolution import Deconvolution

__all__ = ["plain_formulation"]


@contextmanager
def plain_formulation(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes the same the way public code does, with the same parameters.

    - Deformable attention makes locations and softmax in float32 and samples with `grid_sample`.
    - Gradients of deconvolutions are PyTorch's.
    - Tokens stay in the memory format of the patch convolution; merging and feature pyramid work channels first.

    Self-attention is `scaled_dot_product_attention` in both. Prepared models have other modules: they are left alone.
    """
    forwards = {
        BranchMerging: ("forward", _channels_first),
        Deconvolution: ("forward", nn.ConvTranspose2d.forward),
        DeformableCrossAttention: ("forward", _attend),
        FeaturePyramid: ("forward", _channels_first),
        TransformerBranch: ("patch_map", _patch_map),
    }
    with ExitStack() as stack:
        for module in model.modules():
            for kind, (name, function) in forwards.items():
                if isinstance(module, kind):
                    setattr(module, name, MethodType(function, module))
                    stack.callback(delattr, module, name)  # the method of the class is there again
        yield


def _attend(self: DeformableCrossAttention, query: Tensor, value: Tensor) -> Tensor:
    grid, shape = query.shape[1:3], tuple(value.shape[1:3])
    reference = make_reference_points(*grid, device=query.device)
    values = self.value_proj(value.flatten(1, 2)).unflatten(-1, (self.num_heads, -1))
    locations, weights = self.sampling(query.flatten(1, 2), reference, [shape])
    return self.output_proj(ms_deform_attn_reference(values, shape, locations, weights)).unflatten(1, grid)


def _patch_map(self: TransformerBranch, image: Tensor) -> Tensor:
    patch = self.strides[0]
    height, width = (side // patch * patch for side in image.shape[-2:])
    return self.model.patch_embed(image[..., :height, :width])


def _channels_first(self: BranchMerging | FeaturePyramid, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
    return type(self).forward(self, [x.contiguous(memory_format=torch.contiguous_format) for x in maps])
