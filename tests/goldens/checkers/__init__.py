"""Numerical proof: golden cases of the public implementation against this one."""

from .backbones import verify_detection_backbone
from .check import Check, Comparison
from .classifiers import verify_classifier
from .golden import GoldenCase, GoldenError, find_cases
from .loading import verify_loading
from .multimodal import verify_multimodal
from .operators import verify_interaction, verify_op
from .runner import CaseResult, Status, Verifier, run_cases, summary_line

VERIFIERS: dict[str, Verifier] = {
    "op": verify_op,
    "interaction": verify_interaction,
    "detection": verify_detection_backbone,
    "segmentation": verify_detection_backbone,
    "classification": verify_classifier,
    "load_mapping": verify_loading,
    "llava": verify_multimodal,
}
"""Families of cases that need nothing but piip_core; `checkers.detection` has those of detectors."""

__all__ = [
    "VERIFIERS",
    "CaseResult",
    "Check",
    "Comparison",
    "GoldenCase",
    "GoldenError",
    "Status",
    "Verifier",
    "find_cases",
    "run_cases",
    "summary_line",
]
