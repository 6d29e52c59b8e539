"""Mask R-CNN with InternViT-6B."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import InteractionConfig, MergingConfig, PIIPConfig
from .branches import LIGHT_INTERACTION, deit_branch, fused_mlp, internvit_6b, mae_h
from .entry import PublishedNumbers, ZooEntry

__all__ = ["ENTRIES", "lh6b_speedup"]

TABLE = "InternViT-6B (Mask R-CNN, 1x)"


def lh6b_speedup() -> PIIPConfig:
    """The released three-branch models with InternViT-6B: four interactions, global attention."""
    branches = (internvit_6b(512), mae_h(1024, segments=None), deit_branch("L", 1536, None, pretrained_at=384))
    return PIIPConfig(
        branches=tuple(map(fused_mlp, branches)),
        interaction=dataclasses.replace(LIGHT_INTERACTION, num_interactions=4),
    )


def _row(name: str, title: str, config: PIIPConfig, **facts: Any) -> ZooEntry:
    return ZooEntry(name=name, title=title, table=TABLE, config=config, schedule="1x_ms", pad_divisor=64, **facts)


def _lh6b_row(image_size: int, box_ap: float, mask_ap: float, params_m: float, flops_g: float) -> ZooEntry:
    """The paper's three-branch models (Table IV), all windowed; `image_size` is that of InternViT-6B."""
    branches = (internvit_6b(image_size), mae_h(1024), deit_branch("L", 1280, None, pretrained_at=384))
    return _row(
        f"piip_lh6b_1280_1024_{image_size}",
        "PIIP-LH6B",
        PIIPConfig(branches=tuple(dataclasses.replace(branch, window_size=14) for branch in branches)),
        paper=PublishedNumbers(box_ap=box_ap, mask_ap=mask_ap, params_m=params_m, flops_g=flops_g),
        note="The printed #FLOPs lack 1611G: ten of the twelve d x d products per token and layer of ViT-L",
    )


ENTRIES = (
    _row(
        "internvit_6b_1024",
        "InternViT-6B",
        PIIPConfig(
            branches=(internvit_6b(1024),),
            interaction=InteractionConfig(num_interactions=0),
            merging=MergingConfig(kind="single", pyramid_norm="layer"),
        ),
        published=PublishedNumbers(box_ap=53.8, mask_ap=48.1, params_m=5919, flops_g=29323),
        paper=PublishedNumbers(flops_g=24418),
        note="The released model attends globally (29323G); the paper counts windows of 14 (24418G)",
    ),
    _row(
        "piip_h6b_1024_512",
        "PIIP-H6B",
        PIIPConfig(branches=(internvit_6b(512), mae_h(1024))),
        published=PublishedNumbers(box_ap=55.8, mask_ap=49.0, params_m=6872, flops_g=11080),
    ),
    _row(
        "piip_h6b_speedup_1024_512",
        "PIIP-H6B (speed-up)",
        PIIPConfig(
            branches=(fused_mlp(internvit_6b(512)), fused_mlp(mae_h(1024))),
            interaction=LIGHT_INTERACTION,
        ),
    ),
    _lh6b_row(256, 53.5, 47.5, 7269, 5643),
    _lh6b_row(512, 54.4, 47.8, 7271, 10368),
    _lh6b_row(640, 55.7, 49.0, 7273, 13911),
    _row("piip_lh6b_1536_1024_512", "PIIP-LH6B", lh6b_speedup()),
)
