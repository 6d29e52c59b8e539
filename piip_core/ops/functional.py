"""The functional forms of multi-scale deformable attention."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import _library
from .reference import compute_dtype

_VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SpatialShapes = Sequence[Sequence[int]] | Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Samples the levels of `value` bilinearly at the given locations and adds up the samples with the given weights.

    The sampling of multi-scale deformable attention (Deformable DETR, eq. 3; the interaction of PIIP uses one level).
    A location reads like `grid_sample(align_corners=False, padding_mode="zeros")`: (0, 0) is the top left corner of a
    map, (1, 1) its bottom right corner, pixel centres lie at half-integers, and outside is zero. A location that is
    NaN or infinite lies outside: it contributes zero and receives zero gradient.

    Precision: locations and weights are used in float32 (float64 when `value` is), the sum is accumulated in the same,
    and the result has the dtype of `value`. Autocast changes nothing here: float16 or bfloat16 values stay what they
    are. Gradients have the dtypes of the inputs. On CUDA the gradient of `value` is added up with atomics, in an order
    that changes from run to run; with `torch.use_deterministic_algorithms(True)` it is added up in 64-bit fixed point,
    which is slower and always the same.

    `torch.func.grad`, `vjp`, `jacrev` and `vmap` work. There is no second and no forward-mode derivative: an error, but
    for `torch.func.jvp` inside torch.compile, where PyTorch takes tangents of custom operators for zero.

    Args:
        value: (B, S, M, D) float64, float32, float16 or bfloat16; S = sum of H * W, levels one after the other, each
            row by row. B, S and Q may be 0.
        spatial_shapes: (H, W) of every level, as a sequence of pairs or an integer tensor (L, 2). A tensor on a GPU
            costs a synchronisation, pairs do not.
        sampling_locations: (B, Q, M, L, P, 2) floating, (x, y).
        attention_weights: (B, Q, M, L, P) floating.

    Returns:
        (B, Q, M * D).

    Raises:
        TypeError: for an argument of the wrong kind or dtype.
        ValueError: for shapes that do not fit each other, or tensors on different devices.
        NotImplementedError: for a derivative that there is not.
    """
    shapes = flatten_spatial_shapes(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    dtype = compute_dtype(value.dtype)
    return _library.ms_deform_attn(value, shapes, sampling_locations.to(dtype), attention_weights.to(dtype))


def deform_attn_grid(
    value: Tensor,
    value_shapes: SpatialShapes,
    query_shape: Sequence[int],
    sampling: Tensor,
    num_points: int = 4,
) -> Tensor:
    """Multi-scale deformable attention whose queries are the pixels of a map, straight from what one linear predicts.

    The same as `ms_deform_attn` (the same numbers but for rounding, and the same words on dtypes, gradients and
    locations outside of the maps or not finite) with everything before the sampling inside: the query at (y, x) reads
    at ((x + 0.5) / Wq, (y + 0.5) / Hq) plus its offsets, with the softmax of its logits. Neither locations nor weights
    exist in memory, and only the inputs are kept for the backward pass. Several times faster for narrow heads.

    Args:
        value: (B, S, M, D) float64, float32, float16 or bfloat16; S = sum of H * W, levels one after the other, each
            row by row. B and S may be 0.
        value_shapes: (H, W) of every level, as a sequence of pairs or an integer tensor (L, 2).
        query_shape: (Hq, Wq) of the map of queries; may hold 0.
        sampling: (B, Hq * Wq, 3 * M * L * P) floating, queries row by row: the offsets in pixels of the level, ordered
            (M, L, P, 2) with (x, y) last, then the logits, ordered (M, L, P). It may have another dtype than `value`.
        num_points: P. The softmax goes over all L * P samples of a head.

    Returns:
        (B, Hq * Wq, M * D) in the dtype of `value`.

    Raises:
        TypeError: for an argument of the wrong kind or dtype.
        ValueError: for shapes that do not fit each other, or tensors on different devices.
    """
    shapes = flatten_spatial_shapes(value_shapes, "value_shapes")
    num_points = _integer(num_points)
    query_height, query_width = _check_grid(value, shapes, query_shape, sampling, num_points)
    if value.dtype == torch.float64 or sampling.dtype == torch.float64:
        sampling = sampling.to(compute_dtype(value.dtype))
    return _library.deform_attn_grid(value, shapes, [query_height, query_width], sampling, num_points)


def flatten_spatial_shapes(spatial_shapes: SpatialShapes, name: str = "spatial_shapes") -> list[int]:
    """Turns the (H, W) pairs of all levels into H0, W0, H1, W1, ...

    Args:
        spatial_shapes: (H, W) of every level, as a sequence of pairs or an integer tensor (L, 2).
        name: what error messages call the argument.

    Raises:
        TypeError, ValueError: if they are not pairs of non-negative integers.
    """
    expected = "expected (H, W) of each level: a sequence of pairs of integers or an integer tensor (L, 2)"
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.is_floating_point() or spatial_shapes.is_complex() or spatial_shapes.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {spatial_shapes.dtype}; {expected}")
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"{name} has shape {tuple(spatial_shapes.shape)}; {expected}")
        spatial_shapes = spatial_shapes.tolist()
    try:
        flat = [_integer(size) for height, width in spatial_shapes for size in (height, width)]
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {spatial_shapes!r}; {expected}") from None
    for size in flat:
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
            raise TypeError(f"{name} holds {size!r} of type {type(size).__name__}; {expected}")
        if size < 0:
            raise ValueError(f"{name} holds {size}; heights and widths must not be negative")
    if not flat:
        raise ValueError(f"{name} is empty; {expected}")
    return flat


def _integer(size: Any) -> Any:
    """Python's integer for NumPy's, whose products overflow, and for a size under `torch.jit.trace`, a 0-d tensor."""
    traced = isinstance(size, Tensor) and torch.jit.is_tracing()
    return int(size) if traced or (not isinstance(size, int) and isinstance(size, Integral)) else size


def _check(value: Tensor, shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> None:
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    _check_tensors(tensors, shapes, "spatial_shapes")
    batch, _, heads, _ = value.shape
    levels, shape = len(shapes) // 2, tuple(sampling_locations.shape)
    if shape != (batch, *shape[1:2], heads, levels, *shape[4:5], 2):
        raise ValueError(
            f"sampling_locations has shape {shape}; expected (B, Q, M, L, P, 2) = ({batch}, Q, {heads}, {levels}, P, 2)"
            f" for value of shape {tuple(value.shape)} and {levels} levels in spatial_shapes"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights has shape {tuple(attention_weights.shape)}; expected (B, Q, M, L, P) = "
            f"{tuple(sampling_locations.shape[:-1])} as sampling_locations has it"
        )


def _check_grid(
    value: Tensor, shapes: list[int], query_shape: Sequence[int], sampling: Tensor, num_points: int
) -> tuple[int, int]:
    _check_tensors({"value": value, "sampling": sampling}, shapes, "value_shapes")
    if isinstance(num_points, bool) or not isinstance(num_points, int | torch.SymInt) or num_points < 0:
        raise ValueError(f"num_points is {num_points!r}; expected a number of points per head and level")
    # one pair, checked as a level's size is
    query_height, query_width = flatten_spatial_shapes([query_shape], "query_shape")
    batch, _, heads, _ = value.shape
    expected = (batch, query_height * query_width, 3 * heads * (len(shapes) // 2) * num_points)
    if tuple(sampling.shape) != expected:
        raise ValueError(
            f"sampling has shape {tuple(sampling.shape)}; expected (B, Hq * Wq, 3 * M * L * P) = {expected} with "
            f"value of shape {tuple(value.shape)}, {len(shapes) // 2} levels in value_shapes, query_shape="
            f"{(query_height, query_width)} and num_points={num_points}"
        )
    return query_height, query_width


def _check_tensors(tensors: dict[str, Tensor], shapes: list[int], shapes_name: str) -> None:
    """What both forms ask of their tensors, "value" first."""
    value = tensors["value"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; expected one device for all")
        if tensor.dtype not in _VALUE_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected float64, float32, float16 or bfloat16")
    if value.dim() != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected (B, S, M, D)")
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    covered = sum(height * width for height, width in pairs)
    if covered != value.shape[1]:
        raise ValueError(
            f"value has S = {value.shape[1]} rows, but the (H, W) in {shapes_name} {pairs} add up to {covered}; "
            "expected the same number"
        )
