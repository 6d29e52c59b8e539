"""Times the deformable-attention operators, forward and backward, against the same computation in PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from piip_core.ops.functional import deform_attn_grid, ms_deform_attn
from piip_core.ops.reference import (
    compute_dtype,
    deform_attn_grid_reference,
    grid_sampling,
    make_reference_points,
    map_sizes,
    ms_deform_attn_reference,
)

from ..timing import clock_for, compare, kernel_seconds, limited_threads, take_turns, time_in_turns

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: queries read value maps of the sizes `value_shapes`."""

    name: str
    value_shapes: tuple[tuple[int, int], ...]
    width: int
    """Channels per head (D)."""
    query_shape: tuple[int, int] | None = None
    """The map whose pixels are the queries; None where they are all pixels of the value maps."""
    heads: int = 16
    points: int = 4

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return math.prod(self.query_shape) if self.query_shape else self.values

    @property
    def values(self) -> int:
        """How many pixels the value maps have together."""
        return sum(height * width for height, width in self.value_shapes)

    @property
    def flat_shapes(self) -> list[int]:
        """H0, W0, H1, W1, ..."""
        return [size for shape in self.value_shapes for size in shape]

    def bytes_moved(self, direction: str, batch: int, value_size: int, sampling_size: int) -> int:
        """The least that has to be read and written, with elements of so many bytes.

        Forward: values, output, and three numbers per sample. Backward: values, the gradient of the output, the samples
        and their gradients, and the gradient of the values, which is added to: read and written.
        """
        maps = batch * self.values * self.heads * self.width * value_size
        output = batch * self.queries * self.heads * self.width * value_size
        samples = 3 * batch * self.queries * self.heads * len(self.value_shapes) * self.points * sampling_size
        return maps + output + samples if direction == "forward" else 3 * maps + output + 2 * samples


# PIIP-TSB at 1568/1120/672 pixels (token maps 98, 70, 42 wide; T, S, B are the ViT sizes), a branch of 300 M parameters
# and one of 6 B, a ConvNeXt stage reading a CLIP map, and the shape the operator was invented for.
CASES = (
    Case(name="T98<-S70", query_shape=(98, 98), value_shapes=((70, 70),), width=6),
    Case(name="S70<-T98", query_shape=(70, 70), value_shapes=((98, 98),), width=12),
    Case(name="S70<-B42", query_shape=(70, 70), value_shapes=((42, 42),), width=12),
    Case(name="B42<-S70", query_shape=(42, 42), value_shapes=((70, 70),), width=24),
    Case(name="L28<-B42", query_shape=(28, 28), value_shapes=((42, 42),), width=32),
    Case(name="H6B 21<-B42", query_shape=(21, 21), value_shapes=((42, 42),), width=100),
    Case(name="ConvNeXt128<-CLIP24", query_shape=(128, 128), value_shapes=((24, 24),), width=8),
    Case(name="DETR encoder", value_shapes=((64, 64), (32, 32), (16, 16), (8, 8)), width=32, heads=8),
)


def make_inputs(case: Case, dtype: torch.dtype, device: str, batch: int) -> tuple[Tensor, ...]:
    """Value and sampling of `deform_attn_grid`; without a query map value, locations and weights of `ms_deform_attn`.

    Offsets are of a few pixels, as trained ones are. Samples stay a fifth of a pixel away from the lines through pixel
    centres: there gradients jump, and rounding would decide. Locations and weights have the dtype that is computed in.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, case.queries, case.heads, len(case.value_shapes), case.points)
    value = torch.randn(batch, case.values, case.heads, case.width, generator=generator)
    offsets = 2 * torch.randn(*shape, 2, generator=generator)
    logits = torch.randn(shape, generator=generator)
    value = value.to(device, dtype)
    maps = [case.query_shape] if case.query_shape else case.value_shapes
    centres = torch.cat([make_reference_points(*map_) for map_ in maps], dim=1)[:, :, :, None, None]
    sizes = map_sizes(case.flat_shapes, offsets)
    pixels = centres * sizes + offsets - 0.5
    offsets += 0.25 - 0.5 * (pixels - pixels.floor())
    if case.query_shape is not None:
        return value, torch.cat((offsets.flatten(2), logits.flatten(2)), dim=-1).to(device, dtype)
    locations = centres + offsets / sizes
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    return value, *(x.to(device, compute_dtype(dtype)) for x in (locations, weights))


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


def transformers_layer(device: str) -> nn.Module:
    """transformers' operator: the original CUDA kernel, from the hub, by the package kernels; on a CPU in PyTorch."""
    if torch.device(device).type == "cuda":
        from kernels import get_kernel

        return get_kernel("kernels-community/deformable-detr", version=1).layers.MultiScaleDeformableAttention()
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    return MultiScaleDeformableAttention()


def implementations(
    case: Case, dtype: torch.dtype, layer: nn.Module | None = None, device: str = "cpu"
) -> dict[str, Callable[..., Tensor]]:
    """Ours, PyTorch's and that of a `transformers_layer`, as functions of what `make_inputs` returns.

    PyTorch's 16-bit cases also in float32, faster on CPUs.
    """

    def ours(value: Tensor, *sampling: Tensor) -> Tensor:
        if case.query_shape is None:
            return ms_deform_attn(value, case.value_shapes, *sampling)
        return deform_attn_grid(value, case.value_shapes, case.query_shape, *sampling, case.points)

    def unfused(sample: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
        def call(value: Tensor, *sampling: Tensor) -> Tensor:
            value = value.to(dtype)
            if case.query_shape is None:
                where = [x.to(dtype) for x in sampling]
            else:
                where = grid_sampling(value, case.flat_shapes, case.query_shape, *sampling, case.points, dtype=dtype)
            return sample(value, case.value_shapes, *where)

        return call

    calls = {"ours": ours, "pytorch": unfused(usual_formulation, dtype)}
    if compute_dtype(dtype) != dtype:
        calls["pytorch in fp32"] = unfused(usual_formulation, compute_dtype(dtype))
    if layer is not None:
        sizes = torch.tensor(case.value_shapes, device=device)
        starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
        calls["transformers"] = unfused(
            lambda value, shapes, *where: layer(value, sizes, list(shapes), starts, *where, 64), dtype
        )
    return calls


def operator_errors(case: Case, dtype: torch.dtype, device: str, batch: int = 2) -> tuple[dict[str, float], bool]:
    """Differences of the output and of each gradient from the reference in float64, over their largest numbers.

    Also whether a second run gave the same numbers.
    """

    def reference(value: Tensor, *sampling: Tensor) -> Tensor:
        if case.query_shape is None:
            return ms_deform_attn_reference(value, case.flat_shapes, *sampling)
        return deform_attn_grid_reference(value, case.flat_shapes, case.query_shape, *sampling, case.points)

    def results(call: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = call(*leaves)
        slope = torch.cos(torch.arange(output.numel(), device=device)).view_as(output).to(dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, slope.to(output.dtype))]

    inputs, ours = make_inputs(case, dtype, device, batch), implementations(case, dtype)["ours"]
    first, second = (results(ours, [tensor.clone() for tensor in inputs]) for _ in range(2))
    exact = results(reference, [tensor.double() for tensor in inputs])
    names = ("output", "value", *(["sampling"] if case.query_shape else ["locations", "weights"]))
    errors = {
        name: ((one.double() - other).abs().max() / other.abs().max()).item()
        for name, one, other in zip(names, first, exact, strict=True)
    }
    return errors, all(map(torch.equal, first, second))


def measure_operator(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 15,
    threads: int = 1,
    layer: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Times forward and backward of every case in every dtype, all implementations in turns in this process.

    Where the queries are a map, all start from offsets and logits, so that the others' softmax and locations are timed
    too; otherwise from locations and weights.

    `dtypes` are names out of `DTYPES`, of values, offsets and logits; `layer` is a `transformers_layer` to time, too.

    Returns:
        A row of `compare` per case, dtype and direction, in milliseconds (of a GPU's kernels alone); "copy" is the copy
        of as many bytes as have to be read and written at least, which "bytes" counts.
    """
    rows = []
    with limited_threads(threads):
        for case, name in tqdm(list(itertools.product(cases, dtypes)), desc="cases", leave=False):
            inputs = make_inputs(case, DTYPES[name], device, batch)
            calls = implementations(case, DTYPES[name], layer, device)
            sizes = inputs[0].element_size(), inputs[1].element_size()
            for direction, prepare in (("forward", _forward), ("backward", _backward)):
                works = {who: prepare(call, inputs) for who, call in calls.items()}
                moved = case.bytes_moved(direction, batch, *sizes)
                works["copy"] = copy_of(moved // 2, device)
                if torch.device(device).type == "cuda":
                    seconds = take_turns({who: partial(kernel_seconds, work) for who, work in works.items()}, repeats)
                else:
                    seconds = time_in_turns(works, repeats, clock_for(device, threads))
                milliseconds = {who: [1e3 * second for second in own] for who, own in seconds.items()}
                what = f"{case.name} (D = {case.width}), {name}, {direction}"
                rows.append(compare(what, "ms", milliseconds, "pytorch") | {"bytes": moved})
    return rows


def copy_of(size: int, device: str) -> Callable[[], object]:
    """Copies so many bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _forward(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    return torch.no_grad()(lambda: call(*inputs))


def _backward(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = call(*leaves)
    return lambda: torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
