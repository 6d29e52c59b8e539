"""Multi-scale deformable attention in plain PyTorch, on any device and in any floating dtype.

The definition that the compiled kernels are tested against, and what runs where they are not available. Forward and
backward are separate because a kernel registered with the dispatcher runs below autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_gathering = ContextVar("gathering", default=False)


def compute_dtype(value_dtype: torch.dtype) -> torch.dtype:
    """The dtype of locations, weights and accumulation for values of dtype `value_dtype`: float64 or float32."""
    return torch.float64 if value_dtype == torch.float64 else torch.float32


def make_reference_points(
    height: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The normalised pixel centres ((x + 0.5) / W, (y + 0.5) / H) of a query map, row by row, as (1, H * W, 1, 2)."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    points = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
    return points.view(1, height * width, 1, 2)


def map_sizes(spatial_shapes: Sequence[int], like: Tensor) -> Tensor:
    """(W, H) of every level as (L, 1, 2) in the dtype and on the device of `like`: what turns pixels into locations.

    Nothing can be read from an empty level; its size counts as 1, so that gradients stay zero.
    """
    pairs = zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)
    sizes = [like.new_full((), size) for height, width in pairs for size in (width, height)]
    return torch.stack(sizes).view(-1, 1, 2).clamp_min(1)


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`ms_deform_attn` in plain PyTorch, differentiable; weights have the dtype of locations.

    Args:
        value: (B, S, M, D).
        spatial_shapes: Flat, H0, W0, H1, W1, ...
        sampling_locations: (B, Q, M, L, P, 2).
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D) in the dtype of `value`.
    """
    batch, _, heads, width = value.shape
    queries = sampling_locations.shape[1]
    output = sampling_locations.new_zeros(batch * heads, width, queries)
    for level, _, image, grid in _levels(value, spatial_shapes, sampling_locations):
        samples = _sample(image, grid)
        output = output + (samples * _weights_of(attention_weights, level)).sum(-1)
    return output.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype).contiguous()


@contextmanager
def gathering(active: bool = True) -> Iterator[None]:
    """Within, `ms_deform_attn_reference` gathers pixels itself instead of calling `grid_sample`, for exporters."""
    token = _gathering.set(active)
    try:
        yield
    finally:
        _gathering.reset(token)


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples (N, D, Q, P) of images (N, D, H, W), zero outside: `grid_sample`, or the same by gathering."""
    if not _gathering.get():
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    count, _, height, width = image.shape
    pixels = image.permute(0, 2, 3, 1).flatten(0, 2)
    first_pixels = torch.arange(count, device=image.device)[:, None, None] * (height * width)
    x, y = ((grid[..., axis] + 1) * (size / 2) - 0.5 for axis, size in enumerate((width, height)))
    left, top = x.floor(), y.floor()
    total = pixels.new_zeros(1)
    for column in (left, left + 1):
        for row in (top, top + 1):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
            index = torch.where(inside, row * width + column, 0.0).long()
            total = total + F.embedding(first_pixels + index, pixels) * weight[..., None]
    return total.permute(0, 3, 1, 2)


def ms_deform_attn_backward_reference(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `ms_deform_attn_reference` with respect to value, locations and weights.

    `grad_output` is (B, Q, M * D); the other arguments are those of the forward.
    """
    batch, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grad_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    grad_locations = torch.zeros_like(sampling_locations, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros_like(attention_weights, memory_format=torch.contiguous_format)
    grad = grad_output.to(sampling_locations.dtype).reshape(batch, queries, heads, width)
    grad = grad.permute(0, 2, 3, 1).reshape(batch * heads, width, queries, 1)
    for level, start, image, grid in _levels(value, spatial_shapes, sampling_locations):
        samples = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        by_weight = (samples * grad).sum(1).view(batch, heads, queries, points)
        grad_weights[:, :, :, level] = by_weight.transpose(1, 2)
        by_image, by_grid = _grid_sample_backward(grad * _weights_of(attention_weights, level), image, grid)
        # The grid spans [-1, 1], the locations [0, 1].
        grad_locations[:, :, :, level] = 2 * by_grid.view(batch, heads, queries, points, 2).transpose(1, 2)
        by_value = by_image.view(batch, heads, width, -1).permute(0, 3, 1, 2)
        grad_value[:, start : start + by_value.shape[1]] = by_value
    return grad_value, grad_locations, grad_weights


def _grid_sample_backward(grad: Tensor, image: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grid_sample` (bilinear, zeros outside, align_corners=False) with respect to both inputs.

    PyTorch does not document the name of this operator: we are below autograd, where nothing public gives gradients.
    Seen working with torch 2.10 to 2.14.
    """
    return torch.ops.aten.grid_sampler_2d_backward(grad, image, grid, 0, 0, False, [True, True])


def _levels(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yields per non-empty level its index, its first row in `value`, and grid_sample's two inputs.

    The image is (B * M, D, H, W), the grid (B * M, Q, P, 2).
    """
    if sampling_locations.numel() == 0 or value.numel() == 0:
        return
    batch, _, heads, width = value.shape
    # A sample reaches the map only from within half a pixel, so [-2, 3] holds every location that counts; what lies
    # farther out, and NaN, is put on the border of that range, where it reads zero and has zero gradient.
    locations = sampling_locations.nan_to_num(nan=-2.0).clamp(-2.0, 3.0)
    start = 0
    for level, (height_, width_) in enumerate(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)):
        size = height_ * width_
        if size == 0:
            continue
        image = value[:, start : start + size].to(sampling_locations.dtype)
        image = image.permute(0, 2, 3, 1).reshape(batch * heads, width, height_, width_)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        yield level, start, image, grid
        start += size


def _weights_of(attention_weights: Tensor, level: int) -> Tensor:
    """The weights of one level as (B * M, 1, Q, P)."""
    return attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)


def grid_sampling(
    value: Tensor,
    value_shapes: Sequence[int],
    query_shape: Sequence[int],
    sampling: Tensor,
    num_points: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Locations and weights as `ms_deform_attn` takes them, computed in `dtype` or that which goes with `value`."""
    batch, queries = sampling.shape[:2]
    shape = (batch, queries, value.shape[2], len(value_shapes) // 2, num_points)
    samples = shape[2] * shape[3] * shape[4]
    dtype = compute_dtype(value.dtype) if dtype is None else dtype
    offsets, logits = sampling.to(dtype).split((2 * samples, samples), dim=-1)
    reference = make_reference_points(*query_shape, device=value.device, dtype=dtype)[:, :, :, None, None]
    locations = reference + offsets.reshape(*shape, 2) / map_sizes(value_shapes, offsets)
    return locations, logits.reshape(shape).flatten(3).softmax(-1).view(shape)


def grid_sampling_backward(
    grad_locations: Tensor, grad_weights: Tensor, weights: Tensor, value_shapes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The gradient of `sampling`, which has dtype `dtype`, from those of what `grid_sampling` made of it."""
    grad_offsets = grad_locations / map_sizes(value_shapes, grad_locations)
    weights, grad_weights = weights.flatten(3), grad_weights.flatten(3)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return torch.cat((grad_offsets.flatten(2), grad_logits.flatten(2)), dim=-1).to(dtype)


def deform_attn_grid_reference(
    value: Tensor, value_shapes: Sequence[int], query_shape: Sequence[int], sampling: Tensor, num_points: int = 4
) -> Tensor:
    """`deform_attn_grid` in plain PyTorch, differentiable; shapes are flat, H0, W0, H1, W1, ..."""
    locations, weights = grid_sampling(value, value_shapes, query_shape, sampling, num_points)
    return ms_deform_attn_reference(value, value_shapes, locations, weights)
