"""Compares this implementation with golden cases recorded from the public one.

Examples:
    python tools/verify_reference.py tests/data/goldens
    python tools/verify_reference.py det3_deit_oddsize.json head_mask_rcnn_a.json

Per case it prints the largest error among outputs, intermediate features ("inter") and gradients ("grad"), relative to
the largest absolute value of the reference; for integers, labels and mask bits the share that differs. The tolerance in
its file decides whether a case passes. The last line counts; the exit status is 1 if any case failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings

import torch

from piip_core.errors import NotSupportedYet
from piip_core.verification import (
    VERIFIERS,
    Check,
    GoldenCase,
    GoldenError,
    Status,
    Verifier,
    find_cases,
    run_cases,
    summary_line,
)

DETECTRON2_FAMILIES = ("detection_head", "test_pipeline")


def without_detectron2(case: GoldenCase) -> Check:
    raise NotSupportedYet("needs Detectron2, which is not installed")


def all_verifiers() -> dict[str, Verifier]:
    """Verifiers by family; those that need Detectron2 say so where it is missing."""
    if importlib.util.find_spec("detectron2") is None:
        return VERIFIERS | dict.fromkeys(DETECTRON2_FAMILIES, without_detectron2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Detectron2 imports things that other packages deprecate
        from piip.verification import VERIFIERS as DETECTRON2_VERIFIERS
    return VERIFIERS | DETECTRON2_VERIFIERS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="golden case (json beside safetensors), or folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)  # sampling in training losses
    try:
        cases = find_cases(args.paths)
    except GoldenError as error:
        parser.error(str(error))
    results = []
    for result in run_cases(cases, all_verifiers()):
        print(result, flush=True)
        results.append(result)
    print(summary_line(results))
    return int(any(result.status is Status.FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
