"""Running golden cases and saying what came out."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from piip_core.errors import NotSupportedYet

from .check import Check, Comparison
from .golden import RESULTS, GoldenCase, GoldenError, find_cases

Verifier = Callable[[GoldenCase], Check]

# Families of cases by what verifies them
VERIFIERS = {
    "op": "operators:verify_op",
    "interaction": "operators:verify_interaction",
    "detection": "dense:verify_dense",
    "segmentation": "dense:verify_dense",
    "classification": "dense:verify_dense",
    "load_mapping": "loading:verify_loading",
    "llava": "multimodal:verify_multimodal",
    "detection_head": "detection:verify_detection_head",
    "segmentation_head": "detection.segmentation:verify_segmentation_head",
    "segmentation_inference": "detection.segmentation:verify_segmentation_inference",
    "dino_decoder": "detection.dino_transformer:verify_dino_decoder",
    "dino_dn": "detection.dino_detector:verify_dino_denoising",
    "dino_encoder": "detection.dino_transformer:verify_dino_encoder",
    "dino_loss": "detection.dino_losses:verify_dino_loss",
    "dino_neck": "detection.dino_transformer:verify_dino_neck",
    "dino_test": "detection.dino_detector:verify_dino_test",
    "test_pipeline": "detection.pipeline:verify_test_pipeline",
    "bench_gqa": "llava.benchmarks:verify_gqa",
    "bench_mmbench": "llava.benchmarks:verify_mmbench",
    "bench_mmvet": "llava.benchmarks:verify_mmvet",
    "bench_pope": "llava.benchmarks:verify_pope",
    "bench_prompt": "llava.benchmarks:verify_questions",
    "bench_scienceqa": "llava.benchmarks:verify_scienceqa",
    "bench_seed": "llava.benchmarks:verify_seed",
    "bench_textvqa": "llava.benchmarks:verify_textvqa",
    "bench_vqav2": "llava.benchmarks:verify_vqav2",
    "llava_collate": "llava.data:verify_collate",
    "llava_full": "llava.models:verify_complete_model",
    "llava_image": "llava.images:verify_image_modes",
    "llava_mask": "llava.text:verify_masks",
    "llava_prompt": "llava.text:verify_prompts",
    "llava_sampler": "llava.data:verify_sampler",
    "llava_schedule": "llava.schedule:verify_schedule",
    "llava_splice": "llava.models:verify_splicing",
    "llava_tokenizer": "llava.text:verify_tokenizer",
    "preprocess": "llava.images:verify_preprocess",
}


class Status(Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_SUPPORTED = "not supported yet"


@dataclass(frozen=True)
class CaseResult:
    """What came out of one case.

    Attributes:
        name: The case.
        status: The verdict.
        comparisons: Every tensor that was compared.
        reason: Why the case failed as a whole or is not supported.
    """

    name: str
    status: Status
    comparisons: tuple[Comparison, ...] = ()
    reason: str = ""

    def worst(self, kind: str) -> float | None:
        """Largest error among the results of one kind ("output", "inter" or "grad"), None without any."""
        return max((c.error for c in self.comparisons if c.name.split(".")[0] == kind), default=None)

    def __str__(self) -> str:
        errors = "  ".join(f"{kind} {self.worst(kind):.1e}" for kind in RESULTS if self.worst(kind) is not None)
        lines = [f"{self.name:<36} {self.status.value:<18} {errors or self.reason}"]
        if self.status is Status.FAILED:
            lines += [f"    {self.reason}"] if errors and self.reason else []
            lines += [f"    {c.name}: error {c.error:.3e} {c.detail}" for c in self.comparisons if not c.passed]
        lines += [f"    {c.name}: {c.detail}" for c in self.comparisons if c.refused]
        return "\n".join(lines)


def find_verifier(family: str) -> Verifier:
    """What verifies a family of cases.

    Raises:
        NotSupportedYet: For an unknown family, or where the package is missing that its verifier needs.
    """
    if family not in VERIFIERS:
        raise NotSupportedYet(f"family {family!r}")
    module, function = VERIFIERS[family].split(":")
    package = {"detection": "detectron2", "llava": "transformers"}.get(module.split(".")[0])
    if package and importlib.util.find_spec(package) is None:
        raise NotSupportedYet(f"needs {package}, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both import things that other packages deprecate
        return getattr(importlib.import_module(f"checkers.{module}"), function)


def run_cases(cases: Iterable[GoldenCase], find: Callable[[str], Verifier] = find_verifier) -> Iterator[CaseResult]:
    """Runs each case with the verifier that `find` gives for its family.

    An exception inside a case makes that case fail and no other; `NotSupportedYet` marks it as such.
    """
    for case in cases:
        try:
            comparisons = tuple(find(case.family)(case).finish().comparisons)
        except NotSupportedYet as error:
            yield CaseResult(case.name, Status.NOT_SUPPORTED, reason=error.feature)
        except Exception as error:  # whatever a broken case or model raises, the others still run
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}"
            yield CaseResult(case.name, Status.FAILED, reason=reason)
        else:
            passed = bool(comparisons) and all(comparison.passed for comparison in comparisons)
            status, reason = Status.PASSED if passed else Status.FAILED, "" if comparisons else "nothing was compared"
            yield CaseResult(case.name, status, comparisons, reason)


def summary_line(results: Iterable[CaseResult]) -> str:
    """`N passed, M failed, K not supported yet`."""
    statuses = [result.status for result in results]
    return ", ".join(f"{statuses.count(status)} {status.value}" for status in Status)


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Compares the cases of a command line, a line each and a last line that counts; returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="golden case (json beside safetensors), or folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)  # sampling in training losses
    try:
        cases = find_cases(args.paths)
    except GoldenError as error:
        parser.error(str(error))
    results = []
    for result in run_cases(cases):
        print(result, flush=True)
        results.append(result)
    print(summary_line(results))
    return int(any(result.status is Status.FAILED for result in results))
