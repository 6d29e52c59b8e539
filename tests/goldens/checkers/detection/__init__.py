"""Golden cases that need Detectron2: heads, detections, test-time pipelines."""

from __future__ import annotations

from checkers import Check, GoldenCase
from piip_core.errors import NotSupportedYet

from .cascade import verify_cascade_mask_rcnn
from .roi_heads import verify_mask_rcnn
from .rpn import verify_fpn_rpn

__all__ = ["verify_detection_head"]

_DETECTORS = {"MaskRCNN": verify_mask_rcnn, "CascadeRCNN": verify_cascade_mask_rcnn}


def verify_detection_head(case: GoldenCase) -> Check:
    """FPN with RPN, or a whole detector behind given feature maps, whichever the case records."""
    if "output.fpn.0" in case.results:
        return verify_fpn_rpn(case)
    kind = case.config["type"]
    if kind not in _DETECTORS:
        raise NotSupportedYet(f"heads of {kind}")
    return _DETECTORS[kind](case)
