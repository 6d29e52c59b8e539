"""Compares this implementation with golden cases recorded from the public one.

Examples:
    python tools/verify_reference.py tests/data/goldens
    python tools/verify_reference.py det3_deit_oddsize.json head_mask_rcnn_a.json

Per case it prints the largest error among outputs, intermediate features ("inter") and gradients ("grad"), relative to
the largest absolute value of the reference; for integers, labels and mask bits the share that differs. The tolerance in
its file decides whether a case passes. Inputs that the public code takes and ours refuses on purpose are told as
"refused as documented", and the rest of their case is compared. The last line counts; the exit status is 1 if any case
failed.
"""

from __future__ import annotations

import argparse
import importlib
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

# Families by what they need: the package, and the package with their verifiers
OPTIONAL = {
    "detectron2": (
        "piip.verification",
        (
            "detection_head",
            *(f"dino_{topic}" for topic in ("decoder", "dn", "encoder", "loss", "neck", "test")),
            "segmentation_head",
            "segmentation_inference",
            "test_pipeline",
        ),
    ),
    "transformers": (
        "llava_piip.verification",
        (
            *(
                f"bench_{topic}"
                for topic in ("gqa", "mmbench", "mmvet", "pope", "prompt", "scienceqa", "seed", "textvqa", "vqav2")
            ),
            *(f"llava_{topic}" for topic in ("collate", "full", "image", "mask", "prompt", "sampler", "schedule")),
            "llava_splice",
            "llava_tokenizer",
            "preprocess",
        ),
    ),
}


def all_verifiers() -> dict[str, Verifier]:
    """Verifiers by family; those that need Detectron2 or transformers say so where it is missing."""
    verifiers = dict(VERIFIERS)
    for package, (module, families) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            verifiers |= dict.fromkeys(families, missing(package))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both import things that other packages deprecate
            verifiers |= importlib.import_module(module).VERIFIERS
    return verifiers


def missing(package: str) -> Verifier:
    """A verifier that says what it would need."""

    def verify(case: GoldenCase) -> Check:
        raise NotSupportedYet(f"needs {package}, which is not installed")

    return verify


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
