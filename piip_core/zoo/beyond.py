"""Pyramids of networks newer than the paper: configured, counted and tested, not trained. Nobody has published scores.

Image sizes are the planner's (tools/plan.py --branches dinov3:s,b,l) at the FLOPs of the paper's rows, or those of the
published row with the same head.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from . import families
from .entry import ClassificationEntry, ClassificationNumbers, ZooEntry

_SEES_ALL = 2048  # networks of this width or more attend globally: their images are small
_SBL = "dinov3:s,b,l"
_ROWS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    (_SBL, (1120, 672, 448), {}),
    (_SBL, (1568, 1120, 672), {}),
    (_SBL, (1568, 1120, 672), {"frozen": True}),
    ("dinov3:s+,b,l", (1792, 1120, 560), {}),
    ("dinov3_convnext:t,s,b", (1024, 672, 448), {"pad_divisor": 32}),
    ("dinov3_convnext:t,dinov3:s,b", (1024, 672, 448), {"pad_divisor": 32, "window_size": 14}),
    ("pe_spatial:s,b,l", (1568, 1120, 672), {}),
    ("eva02:s,b,l", (1568, 1120, 672), {}),
    (_SBL, (1568, 1120, 672), {"head": "cascade_mask_rcnn", "schedule": "3x_ms"}),
    (_SBL, (1568, 1120, 672), {"head": "cascade_mask_rcnn", "schedule": "3x_ms", "frozen": True}),
    (_SBL, (1792, 1120, 672), {"head": "dino", "schedule": "3x_ms"}),
    (_SBL, (1792, 1120, 672), {"head": "dino", "schedule": "3x_ms", "frozen": True}),
    ("dinov3:s,l,7b", (1536, 1024, 512), {"head": "dino", "schedule": "2x_ms", "frozen": True}),
    (_SBL, (1120, 448, 336), {"head": "upernet", "schedule": "160k"}),
    (_SBL, (1120, 448, 336), {"head": "upernet", "schedule": "160k", "frozen": True}),
)


def _name(
    networks: str,
    image_sizes: tuple[int, ...],
    *,
    head: str = "mask_rcnn",
    schedule: str = "1x",
    frozen: bool = False,
    **_: Any,
) -> str:
    return f"{head}_{families.slug(networks, image_sizes)}{'_frozen' * frozen}_{schedule}"


_BY_NAME = {_name(networks, sizes, **facts): (networks, sizes, facts) for networks, sizes, facts in _ROWS}
NAMES = tuple(_BY_NAME)
"""Of the detectors and segmentors, which are those of their configs, too."""


@cache  # networks of timm are built, without memory, to see what they are
def entry(name: str) -> ZooEntry:
    """A detector or segmentor by name."""
    networks, image_sizes, facts = _BY_NAME[name]
    facts = {"window_size": 28, "folder": "beyond", "note": _licences(networks), **facts}
    found = families.entry(networks, image_sizes, **facts)
    first, *others = found.config.branches
    if first.network.dims[-1] >= _SEES_ALL:
        first = dataclasses.replace(first, window_size=None)
    config = dataclasses.replace(found.config, branches=(first, *others))
    return dataclasses.replace(found, name=name, backbone=found.name, config=config)


@cache
def classifier() -> ClassificationEntry:
    """The classifier."""
    config = families.classifier(_SBL, (384, 224, 96))
    return ClassificationEntry(
        name="piip_dinov3_sbl_384_224_96",
        title=f"PIIP {_SBL}",
        config=config,
        training_config=config,
        published=ClassificationNumbers(None),
        note=_licences(_SBL),
        folder="beyond",
    )


def entries() -> tuple[ZooEntry | ClassificationEntry, ...]:
    """All of them, in the order of the table."""
    return (*map(entry, NAMES), classifier())


def _licences(networks: str) -> str:
    found = dict.fromkeys(map(families.licence_of, families.parse(networks)))
    return f"Licence of the pretrained weights: {', '.join(found)}"
