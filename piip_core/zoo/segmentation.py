"""UperNet on ADE20K with InternViT-6B (released) and with DeiT III branches (in the paper only)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..config import InteractionConfig, MergingConfig, PIIPConfig
from .branches import LIGHT_INTERACTION, deit_branch, fused_mlp, internvit_6b, mae_h, with_own_grid
from .entry import IMAGENET_MEAN, IMAGENET_STD, PublishedNumbers, ZooEntry

__all__ = ["ENTRIES"]

TABLE = "UperNet (ADE20K)"


def _row(backbone: str, title: str, config: PIIPConfig, schedule: str = "80k", **facts: Any) -> ZooEntry:
    config = dataclasses.replace(config, branches=tuple(map(with_own_grid, config.branches)))
    return ZooEntry(
        name=f"{backbone}_upernet",
        backbone=backbone,
        title=title,
        table=TABLE,
        config=config,
        head="upernet",
        schedule=schedule,
        pad_divisor=32,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        **facts,
    )


def _h6b_row(image_size: int, miou: float, params_m: float, flops_g: float) -> ZooEntry:
    return _row(
        f"piip_h6b_512_{image_size}",
        "PIIP-H6B",
        PIIPConfig(
            branches=(fused_mlp(internvit_6b(image_size)), fused_mlp(mae_h(512))), interaction=LIGHT_INTERACTION
        ),
        published=PublishedNumbers(miou=miou, params_m=params_m, flops_g=flops_g),
    )


def _deit_row(
    sizes: str, image_sizes: tuple[int, ...], pretrained_at: Literal[224, 384], miou: float, flops_g: float
) -> ZooEntry:
    """A row of the paper's Table VII; the smallest image has less than one window, hence global attention."""
    largest, *others = reversed(list(zip(sizes, image_sizes, strict=True)))
    windows = [(*largest, None), *((*other, 28) for other in others)]
    return _row(
        "_".join(["piip", sizes.lower(), *map(str, image_sizes)]),
        f"PIIP-{sizes}",
        PIIPConfig(branches=tuple(deit_branch(*branch, pretrained_at=pretrained_at) for branch in windows)),
        schedule="160k",
        paper=PublishedNumbers(miou=miou, flops_g=flops_g),
        note="In the paper only: windows were found from the printed cost, and what it does not say is as in the "
        "released models",
    )


ENTRIES = (
    _deit_row("TSB", (896, 448, 336), 224, 51.6, 118),
    _deit_row("SBL", (1120, 448, 336), 384, 54.3, 456),
    _row(
        "internvit_6b_512",
        "InternViT-6B",
        PIIPConfig(
            branches=(fused_mlp(internvit_6b(512)),),
            interaction=InteractionConfig(num_interactions=0),
            merging=MergingConfig(kind="single", pyramid_norm="layer"),
        ),
        published=PublishedNumbers(miou=58.42, params_m=5910, flops_g=6364),
        paper=PublishedNumbers(miou=58.36, flops_g=6105),
    ),
    _h6b_row(192, 57.81, 6745, 1663),
    _h6b_row(256, 58.35, 6745, 2354),
    _h6b_row(384, 59.32, 6746, 4374),
    _h6b_row(512, 59.85, 6747, 7308),
)
