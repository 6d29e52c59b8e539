"""The operators' kernels in Triton, for GPUs where the CUDA kernels were not compiled; _library.py registers them.

One forward and one backward kernel serve both operators, as in csrc/cuda: a program handles BLOCK pairs of a query and
a head, all channels side by side, and goes through their samples. Heads of any width: tiles are powers of two, masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512  # elements that a program holds at a time, 4 to each thread
_MOST_CHANNELS = 128


@triton.jit
def _find_items(sizes, HEADS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Pairs of query and head: which exist, their heads, rows of queries, first rows of values, and where they are."""
    items = sizes[0] >> 1
    values = sizes[1] >> 1
    queries = sizes[2] >> 1
    lines = sizes[3] >> 1
    columns = sizes[4] >> 1
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = item < items
    item = tl.minimum(item, items - 1)  # the others repeat the last one, and are not stored
    row = item // HEADS
    image = row // queries
    query = (row - image * queries).to(tl.int32)
    y = ((query // columns).to(ACC) + 0.5) / lines
    x = ((query % columns).to(ACC) + 0.5) / columns
    return item, exists, item % HEADS, row, image * values, x, y


@triton.jit
def _load_weights(weights, first, column, SAMPLES: tl.constexpr, FUSED: tl.constexpr, ACC: tl.constexpr):
    """The weights of all samples of each pair, (BLOCK, power of two); those of the fused form are a softmax."""
    kept = (column < SAMPLES)[None, :]
    tile = tl.load(weights + first[:, None] + column[None, :], mask=kept, other=0).to(ACC)
    if FUSED:
        tile = tl.where(kept, tile, float("-inf"))
        tile = tl.exp(tile - tl.max(tile, 1)[:, None])
        tile = tile / tl.sum(tile, 1)[:, None]
    return tile


@triton.jit
def _find_sample(positions, first, index, x, y, height, width, FUSED: tl.constexpr, ACC: tl.constexpr):
    """Whether the sample can touch the map (NaN does not), its upper left pixel, and where it lies within the pixel."""
    across = tl.load(positions + first + 2 * index).to(ACC)
    down = tl.load(positions + first + 2 * index + 1).to(ACC)
    if FUSED:
        across += x * width
        down += y * height
    else:
        across *= width
        down *= height
    across -= 0.5
    down -= 0.5
    inside = (across > -1) & (down > -1) & (across < width) & (down < height)
    across = tl.where(inside, across, 0.0)
    down = tl.where(inside, down, 0.0)
    left = tl.floor(across)
    top = tl.floor(down)
    return inside, left.to(tl.int32), top.to(tl.int32), across - left, down - top


@triton.jit
def _find_corner(corner: tl.constexpr, inside, left, top, fx, fy, height, width):
    """One of the four pixels around a sample: whether it is on the map, its number there, its parts of the sample."""
    x = left + corner % 2
    y = top + corner // 2
    on_map = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    across = fx if corner % 2 else 1 - fx
    down = fy if corner // 2 else 1 - fy
    return on_map, y.to(tl.int64) * width + x, across, down


@triton.jit
def _forward_kernel(
    output,
    value,
    positions,
    weights,
    shapes,
    sizes,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLE_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    FUSED: tl.constexpr,
    ACC: tl.constexpr,
):
    SAMPLES: tl.constexpr = LEVELS * POINTS
    item, exists, head, row, start, x, y = _find_items(sizes, HEADS, BLOCK, ACC)
    column = tl.arange(0, SAMPLE_TILE)
    first_position = (row * (HEADS * (3 if FUSED else 2)) + head * 2) * SAMPLES
    first_weight = (row * (HEADS * (3 if FUSED else 1)) + head) * SAMPLES
    all_weights = _load_weights(weights, first_weight, column, SAMPLES, FUSED, ACC)
    for first in range(0, WIDTH, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        within = (channel < WIDTH)[None, :]
        total = tl.zeros((BLOCK, CHANNELS), ACC)
        level_start = start
        for level in tl.static_range(LEVELS):
            height = shapes[2 * level] >> 1
            width = shapes[2 * level + 1] >> 1
            for point in range(POINTS):
                index = level * POINTS + point
                weight = tl.sum(tl.where(column[None, :] == index, all_weights, 0.0), 1)
                inside, left, top, fx, fy = _find_sample(
                    positions, first_position, index, x, y, height, width, FUSED, ACC
                )
                for corner in tl.static_range(4):
                    on_map, pixel, across, down = _find_corner(corner, inside, left, top, fx, fy, height, width)
                    offset = (((level_start + pixel) * HEADS + head) * WIDTH)[:, None] + channel[None, :]
                    element = tl.load(value + offset, mask=on_map[:, None] & within, other=0).to(ACC)
                    total += (weight * across * down)[:, None] * element
            level_start += tl.cast(height, tl.int64) * width
        tl.store(output + (item * WIDTH)[:, None] + channel[None, :], total, mask=exists[:, None] & within)


@triton.jit
def _backward_kernel(
    grad_value,
    grad_positions,
    grad_weights,
    scale,
    grad_output,
    value,
    positions,
    weights,
    shapes,
    sizes,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLE_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    FUSED: tl.constexpr,
    ACC: tl.constexpr,
):
    SAMPLES: tl.constexpr = LEVELS * POINTS
    item, exists, head, row, start, x, y = _find_items(sizes, HEADS, BLOCK, ACC)
    column = tl.arange(0, SAMPLE_TILE)
    first_position = (row * (HEADS * (3 if FUSED else 2)) + head * 2) * SAMPLES
    first_weight = (row * (HEADS * (3 if FUSED else 1)) + head) * SAMPLES
    all_weights = _load_weights(weights, first_weight, column, SAMPLES, FUSED, ACC)
    by_x = tl.zeros((BLOCK, SAMPLE_TILE), ACC)
    by_y = tl.zeros((BLOCK, SAMPLE_TILE), ACC)
    by_weight = tl.zeros((BLOCK, SAMPLE_TILE), ACC)
    for first in range(0, WIDTH, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        within = (channel < WIDTH)[None, :]
        grad = tl.load(grad_output + (item * WIDTH)[:, None] + channel[None, :], mask=within, other=0).to(ACC)
        level_start = start
        for level in tl.static_range(LEVELS):
            height = shapes[2 * level] >> 1
            width = shapes[2 * level + 1] >> 1
            for point in range(POINTS):
                index = level * POINTS + point
                weight = tl.sum(tl.where(column[None, :] == index, all_weights, 0.0), 1)
                inside, left, top, fx, fy = _find_sample(
                    positions, first_position, index, x, y, height, width, FUSED, ACC
                )
                sideways = tl.zeros((BLOCK,), ACC)
                downwards = tl.zeros((BLOCK,), ACC)
                whole = tl.zeros((BLOCK,), ACC)
                for corner in tl.static_range(4):
                    on_map, pixel, across, down = _find_corner(corner, inside, left, top, fx, fy, height, width)
                    offset = (((level_start + pixel) * HEADS + head) * WIDTH)[:, None] + channel[None, :]
                    mask = (exists & on_map)[:, None] & within
                    element = tl.load(value + offset, mask=mask, other=0).to(ACC)
                    product = tl.sum(tl.where(mask, grad * element, 0.0), 1)
                    sideways += down * (product if corner % 2 else -product)
                    downwards += across * (product if corner // 2 else -product)
                    whole += across * down * product
                    part = (weight * across * down)[:, None] * grad
                    if scale is not None:  # sums of integers do not depend on their order
                        part = tl.floor(part.to(tl.float64) * tl.load(scale) + 0.5).to(tl.int64)
                    tl.atomic_add(grad_value + offset, part, mask=mask, sem="relaxed")
                if not FUSED:  # normalised locations, not offsets in pixels
                    sideways *= width
                    downwards *= height
                chosen = column[None, :] == index
                by_x += tl.where(chosen, (weight * sideways)[:, None], 0.0)
                by_y += tl.where(chosen, (weight * downwards)[:, None], 0.0)
                by_weight += tl.where(chosen, whole[:, None], 0.0)
            level_start += tl.cast(height, tl.int64) * width
    if FUSED:  # through the softmax
        by_weight = all_weights * (by_weight - tl.sum(all_weights * by_weight, 1)[:, None])
    mask = exists[:, None] & (column < SAMPLES)[None, :]
    offset = first_position[:, None] + 2 * column[None, :]
    tl.store(grad_positions + offset, by_x, mask=mask)
    tl.store(grad_positions + offset + 1, by_y, mask=mask)
    tl.store(grad_weights + first_weight[:, None] + column[None, :], by_weight, mask=mask)


def ms_deform_attn(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """`piip::ms_deform_attn`; the arguments of all four are said in _library.py."""
    return _forward(value, shapes, None, locations.contiguous(), weights.contiguous(), locations.shape[4])


def deform_attn_grid(
    value: Tensor, shapes: Sequence[int], query_shape: Sequence[int], sampling: Tensor, num_points: int
) -> Tensor:
    """`piip::deform_attn_grid`."""
    sampling = sampling.contiguous()
    return _forward(value, shapes, query_shape, sampling, _logits(sampling), num_points)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`piip::ms_deform_attn_backward`."""
    locations, weights, points = locations.contiguous(), weights.contiguous(), locations.shape[4]
    grads = torch.empty_like(locations), torch.empty_like(weights)
    # The largest possible sum of a value's gradient: every sample of every query with the largest weight
    bound = weights.abs().amax().double() * weights[0, :, 0].numel() if deterministic and weights.numel() else None
    return _backward(grad_output, grads, bound, value, shapes, None, locations, weights, points), *grads


def deform_attn_grid_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    query_shape: Sequence[int],
    sampling: Tensor,
    num_points: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """`piip::deform_attn_grid_backward`."""
    sampling = sampling.contiguous()
    grad = torch.empty_like(sampling)
    bound = sampling.shape[1] if deterministic else None  # the weights of a query add up to 1
    arguments = value, shapes, query_shape, sampling, _logits(sampling), num_points
    return _backward(grad_output, (grad, _logits(grad)), bound, *arguments), grad


def _logits(sampling: Tensor) -> Tensor:
    return sampling[..., sampling.shape[-1] // 3 * 2 :]


def _to_odd(sizes: Sequence[int]) -> tuple[int, ...]:
    """Twice the sizes plus one: Triton compiles a kernel of its own for each place where there is a multiple of 16."""
    return tuple(2 * size + 1 for size in sizes)


def _forward(
    value: Tensor, shapes: Sequence[int], query_shape: Sequence[int] | None, positions: Tensor, *arguments: Any
) -> Tensor:
    batch, _, heads, width = value.shape
    output = value.new_empty(batch, positions.shape[1], heads * width)
    _launch(_forward_kernel, (), output, value.contiguous(), shapes, query_shape, positions, *arguments)
    return output


def _backward(
    grad_output: Tensor, grads: tuple[Tensor, Tensor], bound: Tensor | int | None, value: Tensor, *arguments: Any
) -> Tensor:
    """The gradient of `value`; those of positions and weights go into `grads`.

    Args:
        grad_output: Gradient of the output.
        grads: Of positions and weights.
        bound: If the order of additions must not matter, the most that weights of one value add up to.
        value: As in `_launch`, like all that follows.
        arguments: From shapes on.
    """
    value, grad_output = value.contiguous(), grad_output.contiguous()
    summed = torch.float64 if value.dtype == torch.float64 else torch.float32
    scale = None
    if bound is not None and grad_output.numel():
        bound = grad_output.abs().amax().double() * bound
        # A power of two with which the largest possible sum just fits; NaN makes all of the gradient NaN, not wrong
        shift = (61 - torch.frexp(bound).exponent).clamp(max=1000)
        scale = torch.where(bound > 0, torch.exp2(shift.double()), 1.0).where(bound.isfinite(), torch.nan)
        summed = torch.int64
    grad_value = torch.zeros_like(value, dtype=summed)
    _launch(_backward_kernel, (grad_value, *grads, scale), grad_output, value, *arguments)
    return (grad_value if scale is None else grad_value.double() / scale).to(value.dtype)


def _launch(
    kernel: Any,
    results: tuple[Tensor | None, ...],
    output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    query_shape: Sequence[int] | None,
    positions: Tensor,
    weights: Tensor,
    points: int,
) -> None:
    """Runs a kernel; `output` is the output or its gradient, without `query_shape` it is the form with locations."""
    batch, values, heads, width = value.shape
    levels, queries, fused = len(shapes) // 2, positions.shape[1], query_shape is not None
    samples = levels * points
    lines, columns = query_shape or (1, queries)
    items = batch * queries * heads
    fits = (
        sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True)) == values
        and min(shapes) >= 0
        and lines * columns == queries
        and positions.numel() == (3 if fused else 2) * items * samples
        and weights.numel() == items * samples
        and output.shape == (batch, queries, heads * width)
        and len({tensor.device for tensor in (output, value, positions, weights)}) == 1
    )
    if not fits:  # the functions of functional.py say what; a direct call must not read outside the tensors
        raise ValueError("deformable attention: the tensors do not fit each other or the shapes of the maps")
    if not value.numel() or not positions.numel():
        for result in results or (output,):
            if result is not None:
                result.zero_()
        return
    channels = min(triton.next_power_of_2(width), _MOST_CHANNELS)
    sample_tile = triton.next_power_of_2(samples)
    block = max(1, _TILE // max(channels, sample_tile))
    tensors = (*results, output, value, positions, weights)
    sizes = _to_odd(shapes), _to_odd((items, values, queries, lines, columns))
    constants = (heads, width, levels, points, sample_tile, channels, block, fused)
    acc = tl.float64 if value.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(items, block),)](*tensors, *sizes, *constants, acc)
