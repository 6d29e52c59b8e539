"""The command line: golden cases by path, a line each, and a last line that counts."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import warnings

import torch

from piip_core.errors import NotSupportedYet

from . import VERIFIERS
from .check import Check
from .golden import GoldenCase, GoldenError, find_cases
from .runner import Status, Verifier, run_cases, summary_line

__all__ = ["all_verifiers", "main"]

# Families by what they need: the package, and the package with their verifiers
OPTIONAL = {
    "detectron2": (
        "checkers.detection",
        (
            "detection_head",
            *(f"dino_{topic}" for topic in ("decoder", "dn", "encoder", "loss", "neck", "test")),
            "segmentation_head",
            "segmentation_inference",
            "test_pipeline",
        ),
    ),
    "transformers": (
        "checkers.llava",
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


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Compares the cases of a command line, and returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
