"""DINO with DeiT III and with InternViT-6B branches."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import BranchConfig, MergingConfig, PIIPConfig
from .branches import deit_branch, internvit_6b, mae_h
from .entry import IMAGENET_MEAN, IMAGENET_STD, PublishedNumbers, ZooEntry
from .large import lh6b_speedup

__all__ = ["ENTRIES"]

TABLE = "DINO (COCO, multi-scale training)"

# DINO makes its coarsest level itself and does without the finest
_MERGING = MergingConfig(out_strides=(8, 16, 32))
_WINDOWS = (24, 24, None)  # repeated


def _deit3_384(size: str, image_size: int, depth: int) -> BranchConfig:
    return deit_branch(size, image_size, _WINDOWS * (depth // len(_WINDOWS)), pretrained_at=384)


def _row(backbone: str, title: str, config: PIIPConfig, **facts: Any) -> ZooEntry:
    return ZooEntry(
        name=f"{backbone}_dino",
        backbone=backbone,
        title=title,
        table=TABLE,
        config=dataclasses.replace(config, merging=_MERGING),
        head="dino",
        **facts,
    )


ENTRIES = (
    _row(
        "piip_sbl_1792_1120_672",
        "PIIP-SBL, DeiT III (384)",
        PIIPConfig(branches=(_deit3_384("L", 672, 24), _deit3_384("B", 1120, 12), _deit3_384("S", 1792, 12))),
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        schedule="3x_ms",
        published=PublishedNumbers(box_ap=57.8),
    ),
    _row(
        "piip_h6b_1024_768",
        "PIIP-H6B",
        PIIPConfig(branches=(internvit_6b(768), mae_h(1024))),
        schedule="1x_ms",
        pad_divisor=64,
        published=PublishedNumbers(box_ap=60.0),
    ),
    _row(
        "piip_lh6b_1536_1024_512",
        "PIIP-LH6B",
        lh6b_speedup(),
        schedule="2x_ms",
        pad_divisor=64,
    ),
)
