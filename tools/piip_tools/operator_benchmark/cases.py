"""The calls that are timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from piip_core.ops.reference import compute_dtype, make_reference_points, map_sizes

__all__ = ["CASES", "DTYPES", "Case", "make_inputs"]

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

    Offsets are of a few pixels, as trained ones are. Locations and weights have the dtype that is computed in.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, case.queries, case.heads, len(case.value_shapes), case.points)
    value = torch.randn(batch, case.values, case.heads, case.width, generator=generator)
    offsets = 2 * torch.randn(*shape, 2, generator=generator)
    logits = torch.randn(shape, generator=generator)
    value = value.to(device, dtype)
    if case.query_shape is not None:
        return value, torch.cat((offsets.flatten(2), logits.flatten(2)), dim=-1).to(device, dtype)
    centres = torch.cat([make_reference_points(*shape) for shape in case.value_shapes], dim=1)
    locations = centres[:, :, :, None, None] + offsets / map_sizes(case.flat_shapes, offsets)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    return value, *(x.to(device, compute_dtype(dtype)) for x in (locations, weights))
