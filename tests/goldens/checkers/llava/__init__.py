"""Golden cases of the multimodal model: text, pictures, data, training, the whole model."""

from checkers import Verifier

from .benchmarks import (
    verify_gqa,
    verify_mmbench,
    verify_mmvet,
    verify_pope,
    verify_questions,
    verify_scienceqa,
    verify_seed,
    verify_textvqa,
    verify_vqav2,
)
from .data import verify_collate, verify_sampler
from .images import verify_image_modes, verify_preprocess
from .models import verify_complete_model, verify_splicing
from .schedule import verify_schedule
from .text import verify_masks, verify_prompts, verify_tokenizer

__all__ = ["VERIFIERS"]

VERIFIERS: dict[str, Verifier] = {
    "bench_gqa": verify_gqa,
    "bench_mmbench": verify_mmbench,
    "bench_mmvet": verify_mmvet,
    "bench_pope": verify_pope,
    "bench_prompt": verify_questions,
    "bench_scienceqa": verify_scienceqa,
    "bench_seed": verify_seed,
    "bench_textvqa": verify_textvqa,
    "bench_vqav2": verify_vqav2,
    "llava_collate": verify_collate,
    "llava_full": verify_complete_model,
    "llava_image": verify_image_modes,
    "llava_mask": verify_masks,
    "llava_prompt": verify_prompts,
    "llava_sampler": verify_sampler,
    "llava_schedule": verify_schedule,
    "llava_splice": verify_splicing,
    "llava_tokenizer": verify_tokenizer,
    "preprocess": verify_preprocess,
}
"""Verifiers by family of cases, to go with `checkers.VERIFIERS`."""
