"""Relative position tables of BEiT for another window."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["resize_relative_positions"]


def resize_relative_positions(table: Tensor, side: int) -> Tensor:
    """Resizes a table of relative positions as BEiT does: cubic splines, denser near distance 0.

    The rows of the old table are taken as samples at distances that grow geometrically, 0, 1, 1 + q, 1 + q + q^2, ...,
    with the ratio q for which the outermost one reaches the outermost of the new table.

    Args:
        table: (N, heads), N an odd number squared, row by row.
        side: Rows and columns of the new table, odd.

    Returns:
        (side ** 2, heads) in fp32.
    """
    # Imported here: nothing else in this package needs SciPy
    from scipy.interpolate import RectBivariateSpline

    old = round(table.shape[0] ** 0.5)
    sources = _distances(old, side)
    wanted = np.arange(-(side // 2), side // 2 + 1)
    values = table.double().cpu().numpy().reshape(old, old, -1)
    resized = [
        RectBivariateSpline(sources, sources, values[..., head])(wanted, wanted) for head in range(values.shape[-1])
    ]
    return torch.from_numpy(np.stack(resized, axis=-1)).reshape(side * side, -1).to(table.device, torch.float32)


def _distances(old: int, new: int) -> np.ndarray:
    """Where the entries of an axis of the old table lie on the axis of the new one."""
    half = old // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # the published tolerance: the result depends on it in the sixth digit
        ratio = (low + high) / 2
        if sum(ratio**k for k in range(half)) > new // 2:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum(ratio ** np.arange(half))
    return np.concatenate((-positive[::-1], [0.0], positive))
