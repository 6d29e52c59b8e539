"""Cascade Mask R-CNN with DeiT branches (paper Table III).

The paper does not print the image sizes of these models; they are those of the largest models of Table I here. Its
multi-scale training is taken to be that of the released DINO and InternViT models, in proportion to the image size.
"""

from __future__ import annotations

from typing import Any

from .deit import deit_pyramid
from .entry import DetectionEntry, PublishedNumbers

__all__ = ["ENTRIES"]

TABLE = "Cascade R-CNN"
_IMAGE_SIZES = (1568, 1120, 672)


def _row(sizes: str, paper: PublishedNumbers | None = None, **facts: Any) -> DetectionEntry:
    backbone = "_".join(["piip", sizes.lower(), *map(str, _IMAGE_SIZES)])
    schedule = "3x_ms" if facts else "1x"
    return DetectionEntry(
        name=f"{backbone}_cascade_{schedule}",
        backbone=backbone,
        title=f"PIIP-{sizes}, {'3x + MS' if facts else '1x'}",
        table=TABLE,
        config=deit_pyramid(sizes, _IMAGE_SIZES, window_size=14 if sizes == "TSB" else 28),
        paper=paper or PublishedNumbers(),
        note="The paper prints no image sizes for these models; those here are of the largest models of its Table I",
        detector="cascade_mask_rcnn",
        **facts,
    )


_LONG: dict[str, Any] = {"training_crop": _IMAGE_SIZES[0], "epochs": 36, "lr_drops": (27, 33)}

ENTRIES = (
    _row("TSB"),
    _row("SBL", PublishedNumbers(box_ap=53.6, mask_ap=46.3)),
    _row("TSB", PublishedNumbers(box_ap=53.1, mask_ap=46.5), **_LONG),
    _row("SBL", PublishedNumbers(box_ap=54.5, mask_ap=47.7), **_LONG),
)
