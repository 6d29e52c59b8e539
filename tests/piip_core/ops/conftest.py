"""Inputs of the operator that its tests share."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from piip_core.ops import make_reference_points

SHAPES = ((5, 7), (3, 2), (1, 4))


@dataclass
class Inputs:
    """Arguments of ms_deform_attn, and a gradient for its output."""

    value: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    @property
    def flat_shapes(self) -> list[int]:
        return [size for shape in self.spatial_shapes for size in shape]

    @property
    def arguments(self) -> tuple:
        return self.value, self.spatial_shapes, self.locations, self.weights

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    def sampling(self) -> Tensor:
        """Locations and weights as what deform_attn_grid takes, for queries in one line."""
        sizes = torch.tensor(self.spatial_shapes).flip(1)[:, None]
        centres = make_reference_points(1, self.locations.shape[1], dtype=self.locations.dtype)[:, :, :, None, None]
        offsets = (self.locations - centres) * sizes
        return torch.cat((offsets.flatten(2), self.weights.flatten(2)), dim=-1)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        """Values and gradient in `dtype`, the rest in the dtype that goes with it."""
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        return Inputs(
            self.value.detach().to(device, dtype),
            self.spatial_shapes,
            self.locations.detach().to(device, geometry),
            self.weights.detach().to(device, geometry),
            self.grad_output.to(device, dtype),
        )

    def require_grad(self) -> "Inputs":
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self


def make_inputs(
    batch=2, heads=3, width=6, queries=13, spatial_shapes=SHAPES[:1], points=4, dtype=torch.float64, device="cpu"
) -> Inputs:
    """Random inputs. Samples lie in and up to two pixels around the maps, at least 0.1 pixels away from the lines
    through pixel centres: there the gradient of a location jumps, so rounding would decide on which side it is."""
    generator = torch.Generator().manual_seed(0)
    size, levels = sum(height * width_ for height, width_ in spatial_shapes), len(spatial_shapes)
    samples = (batch, queries, heads, levels, points)
    sizes = torch.tensor([(width_, height) for height, width_ in spatial_shapes], dtype=torch.float64)[:, None]
    pixel = (torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * (sizes + 3)).floor() - 2
    pixel = pixel + 0.1 + 0.8 * torch.rand(*samples, 2, generator=generator, dtype=torch.float64)
    return Inputs(
        torch.randn(batch, size, heads, width, generator=generator, dtype=torch.float64),
        tuple(spatial_shapes),
        (pixel + 0.5) / sizes,
        torch.randn(samples, generator=generator, dtype=torch.float64),
        torch.randn(batch, queries, heads * width, generator=generator, dtype=torch.float64),
    ).to(dtype, device)


@pytest.fixture(name="make_inputs", scope="session")
def make_inputs_fixture():
    """Builds random inputs of the operator; see `make_inputs`."""
    return make_inputs
