"""Golden cases that need Detectron2: heads, detections, test-time pipelines."""

from __future__ import annotations

from piip_core.errors import NotSupportedYet
from piip_core.verification import Check, GoldenCase, Verifier

from .cascade import verify_cascade_mask_rcnn
from .pipeline import verify_test_pipeline
from .roi_heads import verify_mask_rcnn
from .rpn import verify_fpn_rpn

__all__ = ["VERIFIERS", "verify_detection_head", "verify_test_pipeline"]


def verify_detection_head(case: GoldenCase) -> Check:
    """FPN with RPN, or a whole detector behind given feature maps, whichever the case records."""
    if "output.fpn.0" in case.results:
        return verify_fpn_rpn(case)
    kind = case.config["type"]
    if kind not in _DETECTORS:
        raise NotSupportedYet(f"heads of {kind}")
    return _DETECTORS[kind](case)


_DETECTORS: dict[str, Verifier] = {"MaskRCNN": verify_mask_rcnn, "CascadeRCNN": verify_cascade_mask_rcnn}

VERIFIERS: dict[str, Verifier] = {
    "detection_head": verify_detection_head,
    "test_pipeline": verify_test_pipeline,
}
"""Verifiers by family of cases, to go with `piip_core.verification.VERIFIERS`."""
