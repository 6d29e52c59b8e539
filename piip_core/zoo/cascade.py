"""Cascade Mask R-CNN with DeiT branches (paper Table III).

The paper does not print the image sizes of these models; they are those of the largest models of Table I here. Its
multi-scale training is taken to be that of the released DINO and InternViT models, in proportion to the image size.
"""

from __future__ import annotations

from .deit import deit_pyramid
from .entry import PublishedNumbers, ZooEntry

__all__ = ["ENTRIES"]

TABLE = "Cascade R-CNN"
_IMAGE_SIZES = (1568, 1120, 672)


def _row(sizes: str, window_size: int, title: str, schedule: str, paper: PublishedNumbers | None = None) -> ZooEntry:
    backbone = "_".join(["piip", sizes.lower(), *map(str, _IMAGE_SIZES)])
    return ZooEntry(
        name=f"{backbone}_cascade_{schedule}",
        backbone=backbone,
        title=title,
        table=TABLE,
        config=deit_pyramid(sizes, _IMAGE_SIZES, window_size),
        paper=paper or PublishedNumbers(),
        note="The paper prints no image sizes for these models; those here are of the largest models of its Table I",
        head="cascade_mask_rcnn",
        schedule=schedule,
    )


ENTRIES = (
    _row("TSB", 14, "PIIP-TSB, 1x", "1x"),
    _row("SBL", 28, "PIIP-SBL, 1x", "1x", PublishedNumbers(box_ap=53.6, mask_ap=46.3)),
    _row("TSB", 14, "PIIP-TSB, 3x + MS", "3x_ms", PublishedNumbers(box_ap=53.1, mask_ap=46.5)),
    _row("SBL", 28, "PIIP-SBL, 3x + MS", "3x_ms", PublishedNumbers(box_ap=54.5, mask_ap=47.7)),
)
