"""Golden cases that need Detectron2: heads, detections, test-time pipelines."""

from __future__ import annotations

from checkers import Check, GoldenCase, Verifier
from piip_core.errors import NotSupportedYet

from .cascade import verify_cascade_mask_rcnn
from .dino_detector import verify_dino_denoising, verify_dino_test
from .dino_losses import verify_dino_loss
from .dino_transformer import verify_dino_decoder, verify_dino_encoder, verify_dino_neck
from .pipeline import verify_test_pipeline
from .roi_heads import verify_mask_rcnn
from .rpn import verify_fpn_rpn
from .segmentation import verify_segmentation_head, verify_segmentation_inference

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
    "segmentation_head": verify_segmentation_head,
    "segmentation_inference": verify_segmentation_inference,
    "dino_decoder": verify_dino_decoder,
    "dino_dn": verify_dino_denoising,
    "dino_encoder": verify_dino_encoder,
    "dino_loss": verify_dino_loss,
    "dino_neck": verify_dino_neck,
    "dino_test": verify_dino_test,
    "test_pipeline": verify_test_pipeline,
}
"""Verifiers by family of cases, to go with `checkers.VERIFIERS`."""
