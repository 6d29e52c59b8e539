"""Mask R-CNN with InternViT-6B."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from .entry import PublishedNumbers, ZooEntry
from .networks import DEIT3_384, INTERNVIT, MAE

__all__ = ["ENTRIES"]

TABLE = "InternViT-6B (Mask R-CNN, 1x)"

# ViT-H has 32 blocks for 12 interactions: two before each of the first four, three before the others
_H_SEGMENTS = (*((first, first + 1) for first in range(0, 8, 2)), *((first, first + 2) for first in range(8, 32, 3)))


def _internvit_6b(image_size: int) -> BranchConfig:
    return BranchConfig(
        network=INTERNVIT["6B"],
        image_size=image_size,
        drop_path_rate=0.4,
        drop_path_schedule="linear",
        pretrained="weights/intern_vit_6b_224px.pth",
    )


def _mae_h(image_size: int, *, segments: tuple[tuple[int, int], ...] | None = _H_SEGMENTS) -> BranchConfig:
    return BranchConfig(
        network=MAE["H"],
        image_size=image_size,
        segments=segments,
        drop_path_rate=0.4,
        drop_path_schedule="linear",
        pretrained="timm:vit_huge_patch14_224.mae",
    )


def _deit3_l(image_size: int) -> BranchConfig:
    return BranchConfig(
        network=DEIT3_384["L"],
        image_size=image_size,
        drop_path_rate=0.4,
        pretrained="timm:deit3_large_patch16_384.fb_in22k_ft_in1k",
    )


def fused_mlp(branch: BranchConfig) -> BranchConfig:
    """The branch with the MLP of the released "speedup" models, which approximates GELU."""
    return dataclasses.replace(branch, network=dataclasses.replace(branch.network, activation="gelu_tanh"))


LIGHT_INTERACTION = InteractionConfig(projection=False, norm="none")
"""The interactions of the released "speedup" models."""


def _row(name: str, title: str, config: PIIPConfig, **facts: Any) -> ZooEntry:
    facts = {"pad_divisor": 64, "training_crop": config.branches[-1].image_size, **facts}
    resolution = "/".join(str(branch.image_size) for branch in reversed(config.branches))
    return ZooEntry(name=name, title=f"{title} {resolution}", table=TABLE, config=config, **facts)


def _lh6b_row(image_size: int, box_ap: float, mask_ap: float, params_m: float, flops_g: float) -> ZooEntry:
    """The paper's three-branch models (Table IV), all windowed; `image_size` is that of InternViT-6B."""
    branches = (_internvit_6b(image_size), _mae_h(1024), _deit3_l(1280))
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
            branches=(_internvit_6b(1024),),
            interaction=InteractionConfig(num_interactions=0),
            merging=MergingConfig(kind="single", pyramid_norm="layer"),
        ),
        published=PublishedNumbers(box_ap=53.8, mask_ap=48.1, params_m=5919, flops_g=29323),
        paper=PublishedNumbers(flops_g=24418),
        layer_decay=0.95,
        note="The released model attends globally (29323G); the paper counts windows of 14 (24418G)",
    ),
    _row(
        "piip_h6b_1024_512",
        "PIIP-H6B",
        PIIPConfig(branches=(_internvit_6b(512), _mae_h(1024))),
        published=PublishedNumbers(box_ap=55.8, mask_ap=49.0, params_m=6872, flops_g=11080),
    ),
    _row(
        "piip_h6b_speedup_1024_512",
        "PIIP-H6B (speed-up)",
        PIIPConfig(
            branches=(fused_mlp(_internvit_6b(512)), fused_mlp(_mae_h(1024))),
            interaction=LIGHT_INTERACTION,
        ),
    ),
    _lh6b_row(256, 53.5, 47.5, 7269, 5643),
    _lh6b_row(512, 54.4, 47.8, 7271, 10368),
    _lh6b_row(640, 55.7, 49.0, 7273, 13911),
    _row(
        "piip_lh6b_1536_1024_512",
        "PIIP-LH6B",
        PIIPConfig(
            branches=tuple(map(fused_mlp, (_internvit_6b(512), _mae_h(1024, segments=None), _deit3_l(1536)))),
            interaction=dataclasses.replace(LIGHT_INTERACTION, num_interactions=4),
        ),
        learning_rate=2e-4,
        batch_size=32,
    ),
)
