"""Box coding with MMDetection's clamp."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

__all__ = ["CASCADE_STDS", "TwoSidedBox2BoxTransform", "weights_from_stds"]

CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
"""Standard deviations of the box deltas in the three published cascade stages (Detectron2 rounds the third to 1/30)."""


class TwoSidedBox2BoxTransform(Box2BoxTransform):
    """Detectron2's box coding, but a predicted side is also kept from shrinking by more than the clamp.

    Detectron2 limits growth alone (factor 1000/16), so a side predicted more than 62 times smaller than its anchor
    decodes to another box than in the published detectors.
    """

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes (N, k*4) deltas against (N, 4) boxes; same shape as `deltas`, float32."""
        deltas = deltas.float()
        coded = deltas.unflatten(1, (-1, 4))
        limit = coded.new_tensor([float("inf"), float("inf"), *(self.scale_clamp * w for w in self.weights[2:])])
        return super().apply_deltas(coded.maximum(-limit).flatten(1), boxes)


def weights_from_stds(stds: Sequence[float]) -> tuple[float, ...]:
    """Detectron2's weights for the standard deviations in which published configs express them."""
    return tuple(1.0 / std for std in stds)
