"""Assignment of ground truth to boxes by MMDetection's rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

__all__ = ["BestBoxMatcher"]


class BestBoxMatcher(Matcher):
    """Detectron2's matcher with MMDetection's rule for ground truth that no box overlaps enough.

    Every ground truth, in order, takes all boxes with which it has its best IoU, if that is at least `min_quality`,
    from whichever ground truth they were matched with before. Detectron2's own rule has no minimum and leaves them
    matched with the ground truth they overlap most.

    Args:
        thresholds (list[float]): limits between the levels of IoU.
        labels (list[int]): label of each level: 1 for positive, 0 negative, -1 ignored.
        min_quality (float): least best IoU with which a ground truth takes its best boxes; None turns this off.
    """

    def __init__(self, thresholds: Sequence[float], labels: Sequence[int], min_quality: float | None) -> None:
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)
        self.min_quality = min_quality

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Matches a (M, N) IoU matrix: indices of ground truth (N,) int64 and labels (N,) int8."""
        matches, labels = super().__call__(match_quality_matrix)
        if self.min_quality is None or match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        taken = (match_quality_matrix == best) & (best >= self.min_quality)
        number = torch.arange(1, len(taken) + 1, device=taken.device)[:, None]
        last = (taken * number).amax(dim=0)  # number, from 1, of the last ground truth that takes the box
        matches = torch.where(last > 0, last - 1, matches)
        labels[last > 0] = 1
        return matches, labels
