"""Fourier spectra of feature maps (paper Figure 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectrum", "feature_spectrum"]


@dataclass(frozen=True)
class Spectrum:
    """Amplitudes of a feature map over spatial frequency, averaged over channels and relative to frequency 0.

    Attributes:
        frequencies: In units of the map's own highest frequency, half a cycle per cell (the "pi" of plots), (N,).
        log_amplitudes: Natural logarithm of the amplitude at each of them over the amplitude at 0, (N,).
        plane: The same over both axes with frequency 0 in the middle, (H, W).
    """

    frequencies: Tensor
    log_amplitudes: Tensor
    plane: Tensor


def feature_spectrum(features: Tensor) -> Spectrum:
    """Fourier spectrum of a map.

    Each channel is scaled to the same total power, so that a few loud channels do not stand for all. Amplitudes are
    root mean squares over channels and, for the curve, over rings of equal frequency: noise without structure is flat.

    Args:
        features: (H, W, C), at least 2 x 2 cells.

    Raises:
        ValueError: If the map is smaller.
    """
    height, width, _ = features.shape
    if min(height, width) < 2:
        raise ValueError(f"a map of {height} x {width} cells has no spectrum: expected at least 2 x 2")
    power = torch.fft.fft2(features.cpu().double().permute(2, 0, 1)).abs().square()
    tiny = torch.finfo(torch.float64).tiny
    power = (power / power.sum(dim=(1, 2), keepdim=True).clamp(min=tiny)).mean(dim=0)
    floor = power.max() * 1e-24  # what rounding leaves of a frequency that is not there
    highest = min(height, width) // 2
    y, x = (2 * torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    ring = torch.round((y[:, None].square() + x.square()).sqrt() * highest).long().flatten()
    means = torch.bincount(ring, weights=power.flatten()) / torch.bincount(ring).clamp(min=1)
    curve = means[: highest + 1]  # beyond, only the corners of the square contribute
    zero = curve[0].clamp(min=floor)
    return Spectrum(
        frequencies=torch.arange(highest + 1, dtype=torch.float64) / highest,
        log_amplitudes=0.5 * (curve.clamp(min=floor) / zero).log(),
        plane=0.5 * (torch.fft.fftshift(power).clamp(min=floor) / zero).log(),
    )
