"""Registers the operators with PyTorch; the one place that decides which kernels serve them.

`piip::ms_deform_attn` samples at given locations with given weights, `piip::deform_attn_grid` makes both out of what a
linear layer predicts. The compiled library, where it was built, brings the schemas with the CPU and perhaps the CUDA
kernels. Every other case (not built, another device, PIIP_DISABLE_EXTENSION=1) runs the PyTorch reference behind the
same operators, so autograd, torch.compile and torch.export see no difference.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import (
    grid_sampling,
    grid_sampling_backward,
    ms_deform_attn_backward_reference,
    ms_deform_attn_reference,
)

SCHEMAS = (
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> Tensor",
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights, bool deterministic=False) -> (Tensor, Tensor, Tensor)",
    "deform_attn_grid(Tensor value, SymInt[] value_shapes, SymInt[] query_shape, Tensor sampling, int num_points)"
    " -> Tensor",
    "deform_attn_grid_backward(Tensor grad_output, Tensor value, SymInt[] value_shapes, SymInt[] query_shape,"
    " Tensor sampling, int num_points, bool deterministic=False) -> (Tensor, Tensor)",
)
_PACKAGE = Path(__file__).resolve().parent.parent
_REBUILD = "run `pip install --no-build-isolation -v -e .` where a C++20 compiler, ninja and torch are installed"


@dataclass(frozen=True, kw_only=True)
class OperatorStatus:
    """Which kernels serve the operator in this process, and why."""

    compiled: bool
    """Whether the compiled library is loaded; otherwise the PyTorch reference runs everywhere."""
    reason: str
    """Why the library is or is not loaded, in a sentence for the user."""
    cpu_capability: str | None
    """Instruction set of the CPU kernels in use: "default", "avx2" or "avx512"."""
    cuda_version: int | None
    """CUDA runtime version (13000 for 13.0) the CUDA kernels were compiled with, None if there are none."""
    build: dict[str, Any] | None
    """What setup.py recorded when it built (or could not build) the library, None if it left no record."""


def _read_build_record() -> dict[str, Any] | None:
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None


def _load_library() -> OperatorStatus:
    build = _read_build_record()
    path = next(iter(sorted(_PACKAGE.glob("_C*.so"))), None)
    if os.environ.get("PIIP_DISABLE_EXTENSION", "0") not in ("", "0"):
        reason = "switched off by the environment variable PIIP_DISABLE_EXTENSION"
    elif path is None:
        cause = "no build is on record" if build is None else "; ".join(build["errors"]) or "its file is gone"
        reason = f"not built ({cause}); {_REBUILD}"
    else:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reason = (
                f"{path.name} cannot be loaded with torch {torch.__version__} ({error.__cause__ or error}); {_REBUILD}"
            )
        else:
            return OperatorStatus(
                compiled=True,
                reason=f"loaded {path}",
                cpu_capability=torch.ops.piip.cpu_capability(),
                cuda_version=torch.ops.piip.cuda_version() or None,
                build=build,
            )
    library = torch.library.Library("piip", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _KEEP_ALIVE.append(library)
    return OperatorStatus(compiled=False, reason=reason, cpu_capability=None, cuda_version=None, build=build)


_KEEP_ALIVE: list[torch.library.Library] = []
STATUS = _load_library()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _warn_reference_in_use(value: Tensor) -> None:
    if not STATUS.compiled and os.environ.get("PIIP_DISABLE_EXTENSION", "0") in ("", "0"):
        _warn_once(
            "The compiled deformable-attention operator is not available, the PyTorch reference runs instead: right, "
            f"but several times slower. Reason: {STATUS.reason}."
        )
    elif STATUS.compiled and value.is_cuda:
        why = (STATUS.build or {}).get("cuda_reason", "unknown build")
        _warn_once(
            "The deformable-attention operator was built without CUDA kernels, the PyTorch reference runs on the GPU "
            f"instead. Reason: {why}. Set CUDA_HOME (or FORCE_CUDA=1) and {_REBUILD}."
        )


def _forward_reference(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    _warn_reference_in_use(value)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def _backward_reference(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    # PyTorch's own functions inside say what they cannot do deterministically
    return ms_deform_attn_backward_reference(grad_output, value, spatial_shapes, sampling_locations, attention_weights)


def _new_output(value: Tensor, per_query: Tensor) -> Tensor:
    """(B, Q, M * D) for values (B, S, M, D) and what there is of every query, (B, Q, ...)."""
    batch, _, heads, width = value.shape
    return value.new_empty(batch, per_query.shape[1], heads * width)


def _new_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return _new_output(value, sampling_locations)


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(value, sampling_locations, attention_weights)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_locations, grad_weights = torch.ops.piip.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights, deterministic
    )
    return grad_value, None, grad_locations, grad_weights


# The fallback of the grid form goes through the other operator, so it uses that one's kernel where there is one.
def _grid_forward_composed(
    value: Tensor, value_shapes: Sequence[int], query_shape: Sequence[int], sampling: Tensor, num_points: int
) -> Tensor:
    locations, weights = grid_sampling(value, value_shapes, query_shape, sampling, num_points)
    return torch.ops.piip.ms_deform_attn(value, value_shapes, locations, weights)


def _grid_backward_composed(
    grad_output: Tensor,
    value: Tensor,
    value_shapes: Sequence[int],
    query_shape: Sequence[int],
    sampling: Tensor,
    num_points: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    locations, weights = grid_sampling(value, value_shapes, query_shape, sampling, num_points)
    grad_value, grad_locations, grad_weights = torch.ops.piip.ms_deform_attn_backward(
        grad_output, value, value_shapes, locations, weights, deterministic
    )
    return grad_value, grid_sampling_backward(grad_locations, grad_weights, weights, value_shapes, sampling.dtype)


def _grid_forward_fake(
    value: Tensor, value_shapes: Sequence[int], query_shape: Sequence[int], sampling: Tensor, num_points: int
) -> Tensor:
    return _new_output(value, sampling)


def _grid_backward_fake(
    grad_output: Tensor,
    value: Tensor,
    value_shapes: Sequence[int],
    query_shape: Sequence[int],
    sampling: Tensor,
    num_points: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    return _new_gradients(value, sampling)


def _grid_save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.value_shapes, ctx.query_shape, sampling, ctx.num_points = inputs
    ctx.save_for_backward(value, sampling)


def _grid_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
    value, sampling = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_sampling = torch.ops.piip.deform_attn_grid_backward(
        grad_output, value, ctx.value_shapes, ctx.query_shape, sampling, ctx.num_points, deterministic
    )
    return grad_value, None, None, grad_sampling, None


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "Deformable attention (piip::ms_deform_attn, piip::deform_attn_grid) has no second derivative. Call backward() "
        "without create_graph=True; where second-order gradients are needed, use "
        "piip_core.ops.ms_deform_attn_reference, as far as grid_sample supports them."
    )


# The reference serves every backend that the compiled library does not; a kernel registered for a backend goes first.
for _name, _reference, _fake in (
    ("piip::ms_deform_attn", _forward_reference, _forward_fake),
    ("piip::ms_deform_attn_backward", _backward_reference, _backward_fake),
    ("piip::deform_attn_grid", _grid_forward_composed, _grid_forward_fake),
    ("piip::deform_attn_grid_backward", _grid_backward_composed, _grid_backward_fake),
):
    _fragment = torch.library.Library("piip", "IMPL")
    _fragment.impl(_name, _reference, "CompositeExplicitAutograd")
    _KEEP_ALIVE.append(_fragment)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd("piip::ms_deform_attn", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("piip::deform_attn_grid", _grid_backward, setup_context=_grid_save_for_backward)
for _name in ("piip::ms_deform_attn_backward", "piip::deform_attn_grid_backward"):
    torch.library.register_autograd(_name, _refuse_double_backward)
