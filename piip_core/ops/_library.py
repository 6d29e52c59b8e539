"""Registers the operators with PyTorch; the one place that decides which kernels serve them.

`piip::ms_deform_attn` samples at given locations with given weights, `piip::deform_attn_grid` makes both out of what a
linear layer predicts. The compiled library, where it was built, brings the CPU and perhaps the CUDA kernels. GPUs that
it has none for get Triton's. Every other case (not built, another device, PIIP_DISABLE_EXTENSION=1) runs the PyTorch
reference through the same operators, so autograd, torch.compile and torch.export see no difference.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .reference import (
    deform_attn_grid_reference,
    grid_sampling,
    grid_sampling_backward,
    ms_deform_attn_backward_reference,
    ms_deform_attn_reference,
)

SCHEMAS = (
    # value (B, S, M, D), spatial_shapes H0, W0, H1, W1, ..., sampling_locations (B, Q, M, L, P, 2) normalised (x, y),
    # attention_weights (B, Q, M, L, P) -> (B, Q, M * D). Locations and weights are float32, or float64 with float64
    # values.
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> Tensor",
    # Gradients of value, sampling_locations and attention_weights. `deterministic`: do not let the order of additions
    # differ from run to run; CPU kernels never do.
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights, bool deterministic=False) -> (Tensor, Tensor, Tensor)",
    # The same with all that comes before the sampling inside, for queries that are the pixels of a grid (Hq, Wq).
    # sampling (B, Hq * Wq, 3 * M * L * P): offsets in pixels of the value map (M, L, P, 2), then logits (M, L, P).
    # Location = ((x + 0.5) / Wq, (y + 0.5) / Hq) + offset / (W, H); weights = softmax of the logits over (L, P).
    # sampling is float32, float16 or bfloat16, whatever value is of these; float64 with float64 values.
    "deform_attn_grid(Tensor value, SymInt[] value_shapes, SymInt[] query_shape, Tensor sampling, int num_points)"
    " -> Tensor",
    # Gradients of value and sampling, in their dtypes.
    "deform_attn_grid_backward(Tensor grad_output, Tensor value, SymInt[] value_shapes, SymInt[] query_shape,"
    " Tensor sampling, int num_points, bool deterministic=False) -> (Tensor, Tensor)",
    # The instruction set of the CPU kernels on this machine; the CUDA runtime version compiled with, 0 without CUDA.
    "cpu_capability() -> str",
    "cuda_version() -> int",
)
_PACKAGE = Path(__file__).resolve().parent.parent
_REBUILD = "run `pip install --no-build-isolation -v -e .` where a C++20 compiler, ninja and torch are installed"


@dataclass(frozen=True, kw_only=True)
class OperatorStatus:
    """Which kernels serve the operator in this process, and why.

    Attributes:
        compiled: Whether the compiled library is loaded; otherwise the PyTorch reference runs everywhere.
        reason: Why the library is or is not loaded, in a sentence for the user.
        cpu_capability: Instruction set of the CPU kernels in use: "default", "avx2" or "avx512".
        cuda_version: CUDA runtime version (13000 for 13.0) the CUDA kernels were compiled with, None without them.
        triton: Types of the devices that kernels in Triton serve: "cuda" where there are no compiled ones for GPUs.
        build: What setup.py recorded when it built (or could not build) the library, None if it left no record.
    """

    compiled: bool
    reason: str
    cpu_capability: str | None = None
    cuda_version: int | None = None
    triton: tuple[str, ...] = ()
    build: dict[str, Any] | None = None


def _read_build_record() -> dict[str, Any] | None:
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None


def _load_library() -> OperatorStatus:
    library = torch.library.Library("piip", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _KEEP_ALIVE.append(library)
    build = _read_build_record()
    path = next(iter(sorted(_PACKAGE.glob("_kernels*.so"))), None)
    if _disabled():
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
            cuda_version = torch.ops.piip.cuda_version() or None
            return OperatorStatus(
                compiled=True,
                reason=f"loaded {path}",
                cpu_capability=torch.ops.piip.cpu_capability(),
                cuda_version=cuda_version,
                triton=() if cuda_version else _served_by_triton(),
                build=build,
            )
    return OperatorStatus(compiled=False, reason=reason, triton=_served_by_triton(), build=build)


def _disabled() -> str:
    """What is not to be used: "1" all kernels, "compiled" those of the library, "" nothing."""
    wish = os.environ.get("PIIP_DISABLE_EXTENSION", "0")
    return "" if wish == "0" else wish


def _served_by_triton() -> tuple[str, ...]:
    if _disabled() not in ("", "compiled") or not importlib.util.find_spec("triton"):
        return ()
    # Its interpreter runs kernels on CPUs, for tests
    interpreted = _disabled() == "compiled" and os.environ.get("TRITON_INTERPRET") == "1"
    return ("cuda",) * (torch.version.cuda is not None) + ("cpu",) * interpreted


_KEEP_ALIVE: list[torch.library.Library] = []
STATUS = _load_library()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _warn_reference_in_use(value: Tensor) -> None:
    if not STATUS.compiled and not _disabled():
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


def _forward_reference(value: Tensor, *arguments: Any) -> Tensor:
    _warn_reference_in_use(value)
    return ms_deform_attn_reference(value, *arguments)


def _backward_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Without `deterministic`: PyTorch's own functions inside say what they cannot do deterministically
    return ms_deform_attn_backward_reference(*arguments[:5])


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


def _new_output(value: Tensor, per_query: Tensor) -> Tensor:
    """(B, Q, M * D) for values (B, S, M, D) and what there is of every query, (B, Q, ...)."""
    batch, _, heads, width = value.shape
    return value.new_empty(batch, per_query.shape[1], heads * width)


def _new_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """One for each tensor among the inputs of an operator."""
    tensors = (tensor for tensor in inputs if isinstance(tensor, Tensor))
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


@cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """The module of Triton's kernels, if they run on the device, which takes a C compiler, and a GPU that it serves."""
    try:
        from . import triton_kernels

        one = torch.ones(1, 1, 1, 1, device=device)
        triton_kernels.deform_attn_grid(one, (1, 1), (1, 1), torch.zeros(1, 1, 3, device=device), 1)
    except Exception as error:  # compilers and drivers fail in every possible way
        _warn_once(f"Triton's kernels of deformable attention do not run on {device}: {type(error).__name__}: {error}")
        return None
    return triton_kernels


def _through_triton(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        kernels = _triton_kernels(arguments[0].device)
        return reference(*arguments) if kernels is None else getattr(kernels, name)(*arguments)

    return call


# The reference serves every backend that nothing else does; a kernel registered for a backend goes first.
for _name, _reference, _fake in (
    ("piip::ms_deform_attn", _forward_reference, lambda value, _, locations, weights: _new_output(value, locations)),
    ("piip::ms_deform_attn_backward", _backward_reference, lambda _, *inputs, **__: _new_gradients(*inputs)),
    (
        "piip::deform_attn_grid",
        _grid_forward_composed,
        lambda value, _, __, sampling, *___: _new_output(value, sampling),
    ),
    ("piip::deform_attn_grid_backward", _grid_backward_composed, lambda _, *inputs, **__: _new_gradients(*inputs)),
):
    _fragment = torch.library.Library("piip", "IMPL")
    _fragment.impl(_name, _reference, "CompositeExplicitAutograd")
    for _device in STATUS.triton:
        _fragment.impl(_name, _through_triton(_name.removeprefix("piip::"), _reference), _device.upper())
    _KEEP_ALIVE.append(_fragment)
    torch.library.register_fake(_name, _fake)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the tensors among the inputs of an operator, and how the rest goes between them."""
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _inputs_of(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if value is None else value for value in ctx.others]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, *grads = _ms_deform_attn_backward(grad_output, *_inputs_of(ctx), deterministic)
    return grad_value, None, *grads


def _grid_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_sampling = _deform_attn_grid_backward(grad_output, *_inputs_of(ctx), deterministic)
    return grad_value, None, None, grad_sampling, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "Deformable attention (piip::ms_deform_attn, piip::deform_attn_grid) has no second derivative, and no "
        "forward-mode one (torch.func.jvp, jacfwd, hessian). Call backward() without create_graph=True, use "
        "torch.func.vjp or jacrev. Where second derivatives are needed, use the gradient of a gradient "
        "(jacrev(jacrev(...))) of piip_core.ops.ms_deform_attn_reference, as far as grid_sample supports it."
    )


def _differentiable(
    name: str, gradients: Callable[..., Any], save: Callable[..., None], standard: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The operator for callers in Python: as it is registered, and with torch.func's transforms.

    What `register_autograd` makes cannot be transformed, and passes forward-mode derivatives over in silence; compilers
    and tracers on the other hand want the operator itself, and `torch.onnx.export` what it is in `standard` ones.
    Inside torch.compile PyTorch's rules hold.
    """
    operator = getattr(torch.ops.piip, name)
    torch.library.register_autograd(f"piip::{name}", gradients, setup_context=save)

    class Operator(torch.autograd.Function):
        setup_context, backward, jvp = staticmethod(save), staticmethod(gradients), staticmethod(_refuse)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
            result = Operator.apply(*_join_batches(info.batch_size, in_dims, arguments))
            parts = [
                tensor.unflatten(0, (info.batch_size, tensor.shape[0] // info.batch_size))
                for tensor in ((result,) if isinstance(result, Tensor) else result)
            ]
            return (parts[0], 0) if isinstance(result, Tensor) else (tuple(parts), (0,) * len(parts))

    Operator.__name__ = Operator.__qualname__ = name

    def call(*arguments: Any) -> Any:
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return Operator.apply(*arguments)
        return (standard if standard and torch.onnx.is_in_onnx_export() else operator)(*arguments)

    return call


def _join_batches(size: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Iterator[Any]:
    """Makes one batch of the one that `vmap` adds to every tensor and the first axis, which all our tensors have."""
    for dim, argument in zip(dims, arguments, strict=True):
        if isinstance(argument, Tensor):
            argument = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            argument = argument.flatten(0, 1)
        yield argument


_ms_deform_attn_backward = _differentiable("ms_deform_attn_backward", _refuse, _save_nothing)
_deform_attn_grid_backward = _differentiable("deform_attn_grid_backward", _refuse, _save_nothing)
ms_deform_attn = _differentiable("ms_deform_attn", _backward, _save_inputs, ms_deform_attn_reference)
deform_attn_grid = _differentiable("deform_attn_grid", _grid_backward, _save_inputs, deform_attn_grid_reference)

_MACS_PER_SAMPLE = 5  # four corners of the bilinear interpolation and the attention weight


@register_flop_formula(torch.ops.piip.ms_deform_attn)
def ms_deform_attn_flops(value: Sequence[int], shapes: Any, locations: Sequence[int], *_: Any, **__: Any) -> int:
    """Two per multiply-accumulate, as PyTorch counts; of the tensors, the shapes."""
    return 2 * _MACS_PER_SAMPLE * math.prod(locations[:-1]) * value[-1]


@register_flop_formula(torch.ops.piip.deform_attn_grid)
def deform_attn_grid_flops(
    value: Sequence[int], shapes: Any, query_shape: Any, sampling: Sequence[int], *_: Any, **__: Any
) -> int:
    """Two per multiply-accumulate, as PyTorch counts; of the tensors, the shapes."""
    return 2 * _MACS_PER_SAMPLE * math.prod(sampling) // 3 * value[-1]
