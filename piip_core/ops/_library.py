"""Registers the operator `piip::ms_deform_attn` with PyTorch; the one place that decides which kernels serve it.

The compiled library, where it was built, brings the schema with the CPU and perhaps the CUDA kernels. Every other case
(not built, another device, PIIP_DISABLE_EXTENSION=1) runs the PyTorch reference behind the same operator, so autograd,
torch.compile and torch.export see no difference.
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

from .reference import ms_deform_attn_backward_reference, ms_deform_attn_reference

FORWARD_SCHEMA = (
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> Tensor"
)
BACKWARD_SCHEMA = (
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
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
    library.define(FORWARD_SCHEMA)
    library.define(BACKWARD_SCHEMA)
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


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, width = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * width)


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    if STATUS.cuda_version is not None and value.is_cuda:
        _alert_not_deterministic("piip::ms_deform_attn_backward (CUDA)")
    grad_value, grad_locations, grad_weights = torch.ops.piip.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _alert_not_deterministic(name: str) -> None:
    """What at::Context::alertNotDeterministic does, which the stable C++ ABI does not offer."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"{name} adds with atomics and does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. Turn it off around the backward pass, pass warn_only=True, or set "
        "PIIP_DISABLE_EXTENSION=1 and train on the CPU."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "piip::ms_deform_attn has no second derivative. Call backward() without create_graph=True; where second-order "
        "gradients are needed, use piip_core.ops.ms_deform_attn_reference, as far as grid_sample supports them."
    )


# The reference serves every backend that the compiled library does not; a kernel registered for a backend goes first.
for _name, _reference, _fake in (
    ("piip::ms_deform_attn", _forward_reference, _forward_fake),
    ("piip::ms_deform_attn_backward", ms_deform_attn_backward_reference, _backward_fake),
):
    _fragment = torch.library.Library("piip", "IMPL")
    _fragment.impl(_name, _reference, "CompositeExplicitAutograd")
    _KEEP_ALIVE.append(_fragment)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd("piip::ms_deform_attn", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("piip::ms_deform_attn_backward", _refuse_double_backward)
