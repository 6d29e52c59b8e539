"""Published detectors and segmentors, a row of their tables a line."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from ..config import BranchConfig, MergingConfig, PIIPConfig
from .entry import IMAGENET_MEAN, IMAGENET_STD, PublishedNumbers, ZooEntry
from .networks import (
    AUGREG_384,
    BEIT,
    CONVNEXT,
    DINOV2,
    LIGHT_INTERACTION,
    MAE,
    TIMM_SIZES,
    UNIPERCEIVER,
    VIT,
    deit_branch,
    fused_mlp,
    internvit_6b,
    with_own_grid,
)
from .pyramids import (
    baseline,
    convnext_branch,
    deit_pyramid,
    h6b,
    h6b_speedup,
    hybrid_pyramid,
    lh6b,
    lh6b_speedup,
    single_branch,
    windowed,
)

_Numbers = tuple[float | None, ...]  # of `PublishedNumbers`: box AP, mask AP, millions of parameters, GFLOPs, mIoU

_IMAGENET: dict[str, Any] = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


def _entry(
    name: str, title: str, config: PIIPConfig, published: _Numbers = (), paper: _Numbers = (), **facts: Any
) -> ZooEntry:
    return ZooEntry(
        name=name,
        title=title,
        config=config,
        published=PublishedNumbers(*published),
        paper=PublishedNumbers(*paper),
        **facts,
    )


def _join(*words: Any) -> str:
    return "_".join(map(str, words)).lower()


def _vit(size: str, image_size: int, published: _Numbers, paper: _Numbers) -> ZooEntry:
    facts: dict[str, Any] = {"table": _DEIT, "pad_divisor": 64}
    return _entry(_join("vit", size, image_size), f"ViT-{size}", baseline(size, image_size), published, paper, **facts)


def _piip(
    sizes: str,
    window_size: int,
    image_sizes: tuple[int, ...],
    published: _Numbers,
    paper: _Numbers = (),
    note: str = "",
) -> ZooEntry:
    config, facts = deit_pyramid(sizes, image_sizes, window_size), {"table": _DEIT, "note": note}
    return _entry(_join("piip", sizes, *image_sizes), f"PIIP-{sizes}", config, published, paper, **facts)


_DEIT = "DeiT-based models (Mask R-CNN, 1x)"
# Table III prints neither image sizes nor #FLOPs
_TSB_NOTE = (
    "The paper's Table III has a PIIP-TSB of box AP 47.9 and mask AP 42.6, whose image sizes it does not print. No "
    "public model with these branches comes within 1 AP of it"
)
_SBL_NOTE = (
    "The paper's numbers are of its Table III, without image sizes: of the public models this one alone is within the "
    "0.2 AP by which both are said to differ"
)
_DEIT_ENTRIES = (
    _vit("B", 1024, (43.7, 39.7, 90, 463), (43.8, 39.9)),
    _piip("TSB", 14, (1120, 896, 448), (43.6, 38.7, 146, 243), (43.9, 38.6)),
    _piip("TSB", 14, (1568, 896, 448), (45.0, 40.3, 147, 287), (None, 40.2)),
    _piip("TSB", 14, (1568, 1120, 672), (46.5, 41.3, 149, 453), (46.6, 41.4), _TSB_NOTE),
    _vit("L", 1024, (46.7, 42.5, 308, 1542), (46.8,)),
    _piip("SBL", 28, (1120, 672, 448), (46.5, 40.8, 493, 727), (46.7,)),
    _piip("SBL", 28, (1344, 896, 448), (48.3, 42.7, 495, 1002), (48.2, 42.5)),
    _piip("SBL", 28, (1568, 896, 672), (49.3, 43.7, 497, 1464), (49.4,)),
    _piip("SBL", 28, (1568, 1120, 672), (50.0, 44.4), (49.9, 44.6), _SBL_NOTE),
    _piip("TSBL", 28, (1344, 896, 672, 448), (47.1, 41.9, 506, 755), (46.9, 41.6)),
    _piip("TSBL", 28, (1568, 1120, 672, 448), (48.2, 42.9, 507, 861), (None, 42.8)),
    _piip("TSBL", 28, (1792, 1568, 1120, 448), (49.4, 44.1, 512, 1535), (49.6, 44.2)),
)


_large = partial(_entry, table="InternViT-6B (Mask R-CNN, 1x)", schedule="1x_ms", pad_divisor=64)
_global = partial(_large, note="The released model attends globally (29323G); the paper counts windows of 14 (24418G)")
_paper_lh6b = partial(
    _large, note="The printed #FLOPs lack 1611G: ten of the twelve d x d products per token and layer of ViT-L"
)
_LARGE_ENTRIES = (
    _global(
        "internvit_6b_1024",
        "InternViT-6B",
        single_branch(internvit_6b(1024)),
        (53.8, 48.1, 5919, 29323),
        (None, None, None, 24418),
    ),
    _large("piip_h6b_1024_512", "PIIP-H6B", h6b(512, 1024), (55.8, 49.0, 6872, 11080)),
    _large("piip_h6b_speedup_1024_512", "PIIP-H6B (speed-up)", h6b_speedup(512, 1024)),
    _paper_lh6b("piip_lh6b_1280_1024_256", "PIIP-LH6B", lh6b(1280, 1024, 256), paper=(53.5, 47.5, 7269, 5643)),
    _paper_lh6b("piip_lh6b_1280_1024_512", "PIIP-LH6B", lh6b(1280, 1024, 512), paper=(54.4, 47.8, 7271, 10368)),
    _paper_lh6b("piip_lh6b_1280_1024_640", "PIIP-LH6B", lh6b(1280, 1024, 640), paper=(55.7, 49.0, 7273, 13911)),
    _large("piip_lh6b_1536_1024_512", "PIIP-LH6B", lh6b_speedup()),
)

# Stochastic depth where the published settings of a size are one family's as another's
_DROP_PATH = {"B": 0.15, "L": 0.4}
_STRONG_DROP_PATH = {"S": 0.2, "B": 0.3, "L": 0.4}
# networks, stochastic depth, and weights by timm's word for the size
_PRETRAINING = {
    "augreg": (AUGREG_384, _STRONG_DROP_PATH, "timm:vit_{}_patch16_384.augreg_in21k_ft_in1k"),
    "mae": (MAE, _DROP_PATH, "timm:vit_{}_patch16_224.mae"),
    "dinov2": (DINOV2, _STRONG_DROP_PATH, "timm:vit_{}_patch14_dinov2.lvd142m"),
    "beit": (BEIT, _DROP_PATH, "timm:beitv2_{}_patch16_224.in1k_ft_in22k"),
    "uniperceiver": (UNIPERCEIVER, _DROP_PATH, "weights/uni-perceiver-{}-pretrained_converted.pth"),
}
_UNIPERCEIVER_FILES = {"B": "base-L12-H768-224size-torch", "L": "large-L24-H1024-224size"}


def _pretrained_branch(pretraining: str, size: str, image_size: int) -> BranchConfig:
    if pretraining == "deit3":
        return deit_branch(size, image_size, 28)
    networks, drop_path, weights = _PRETRAINING[pretraining]
    words = _UNIPERCEIVER_FILES if pretraining == "uniperceiver" else TIMM_SIZES
    return BranchConfig(
        network=networks[size],
        image_size=image_size,
        window_size=28,
        drop_path_rate=drop_path[size],
        drop_path_schedule="linear",
        pretrained=weights.format(words[size]),
    )


def _pretrained(key: str, title: str, families: str, published: _Numbers = ()) -> ZooEntry:
    """PIIP-SBL 1568/1120/672; `families` names the pretraining of L, B and S."""
    branches = tuple(map(_pretrained_branch, families.split(), "LBS", (672, 1120, 1568)))
    config = PIIPConfig(branches=branches)
    if key.endswith("speedup"):
        config = PIIPConfig(branches=tuple(map(fused_mlp, branches)), interaction=LIGHT_INTERACTION)
    table = "More ViT variants (Mask R-CNN, 1x)"
    return _entry(f"piip_sbl_{key}_1568_1120_672", f"PIIP-SBL, {title}", config, published, table=table)


_PRETRAINING_ENTRIES = (
    _pretrained("augreg384", "AugReg (384)", "augreg augreg augreg", (48.3, 42.6)),
    # Released beside it: lighter interactions, and MLPs that approximate GELU
    _pretrained("augreg384_speedup", "AugReg (384), speed-up", "augreg augreg augreg"),
    _pretrained("uniperceiver", "DeiT III (S) + Uni-Perceiver (BL)", "uniperceiver uniperceiver deit3", (48.8, 42.9)),
    _pretrained("mae", "DeiT III (S) + MAE (BL)", "mae mae deit3", (49.1, 43.0)),
    # The table says DeiT III for S; the released configuration has DINOv2 there too
    _pretrained("dinov2", "DINOv2", "dinov2 dinov2 dinov2", (51.0, 44.7)),
    _pretrained("beitv2", "DeiT III (S) + BEiTv2 (BL)", "beit beit deit3", (51.8, 45.4)),
)


def _hybrid(kinds: str, box_ap: float, mask_ap: float, flops_g: float) -> ZooEntry:
    title = "-".join(["PIIP", *map("".join, zip(kinds, "TSB", strict=True))])
    name = _join(title.replace("-", "_"), 1024, 672, 448)
    facts: dict[str, Any] = {"table": _CONVNEXT, "pad_divisor": 32, **_IMAGENET}
    return _entry(name, title, hybrid_pyramid(kinds), (box_ap, mask_ap, None, flops_g), **facts)


_CONVNEXT = "ConvNeXt-based models (Mask R-CNN, 1x)"
_CONVNEXT_ENTRIES = (
    _entry(
        "convnext_b_1024",
        "ConvNeXt-B",
        single_branch(convnext_branch("B", 1024), out_blocks=CONVNEXT["B"].last_blocks()),
        (42.4, 38.7, None, 321),
        table=_CONVNEXT,
        pad_divisor=64,
    ),
    _hybrid("CCC", 46.4, 41.7, 326),
    _hybrid("CVV", 47.1, 42.4, 373),
    _hybrid("CCV", 46.8, 42.2, 431),
    _hybrid("CVC", 46.7, 42.0, 297),
    _hybrid("VCV", 45.4, 40.9, 291),
    _hybrid("VCC", 45.2, 40.7, 231),
    _hybrid("VVC", 44.8, 40.3, 193),
)


def _cascade(sizes: str, window_size: int, schedule: str, paper: _Numbers = ()) -> ZooEntry:
    backbone = _join("piip", sizes, 1568, 1120, 672)
    return _entry(
        f"{backbone}_cascade_{schedule}",
        f"PIIP-{sizes}, {schedule.replace('_ms', ' + MS')}",
        deit_pyramid(sizes, (1568, 1120, 672), window_size),
        paper=paper,
        backbone=backbone,
        table="Cascade R-CNN",
        note="The paper prints no image sizes for these models; those here are of the largest public models with these "
        "branches",
        head="cascade_mask_rcnn",
        schedule=schedule,
    )


_CASCADE_ENTRIES = (
    _cascade("TSB", 14, "1x"),
    _cascade("SBL", 28, "1x", (53.6, 46.3)),
    _cascade("TSB", 14, "3x_ms", (53.1, 46.5)),
    _cascade("SBL", 28, "3x_ms", (54.5, 47.7)),
)


def _dino(
    backbone: str,
    title: str,
    config: PIIPConfig,
    schedule: str,
    published: _Numbers = (),
    paper: _Numbers = (),
    **facts: Any,
) -> ZooEntry:
    # DINO makes its coarsest level itself and does without the finest
    config = dataclasses.replace(config, merging=MergingConfig(out_strides=(8, 16, 32)))
    facts |= {"table": "DINO (COCO, multi-scale training)", "head": "dino", "backbone": backbone, "schedule": schedule}
    return _entry(f"{backbone}_dino", title, config, published, paper, **facts)


def _dino_sbl() -> PIIPConfig:
    """Every third block is global."""
    sizes = (("L", 672), ("B", 1120), ("S", 1792))
    windows = {size: (24, 24, None) * (VIT[size].depth // 3) for size, _ in sizes}
    branches = (deit_branch(size, side, windows[size], pretrained_at=384) for size, side in sizes)
    return PIIPConfig(branches=tuple(branches))


_DINO_ENTRIES = (
    _dino("piip_sbl_1792_1120_672", "PIIP-SBL, DeiT III (384)", _dino_sbl(), "3x_ms", (57.8,), (57.9,), **_IMAGENET),
    _dino("piip_h6b_1024_768", "PIIP-H6B", h6b(768, 1024), "1x_ms", (60.0,), pad_divisor=64),
    _dino("piip_lh6b_1536_1024_512", "PIIP-LH6B", lh6b_speedup(), "2x_ms", pad_divisor=64),
)


def _upernet(
    backbone: str, title: str, config: PIIPConfig, published: _Numbers = (), paper: _Numbers = (), note: str = ""
) -> ZooEntry:
    return _entry(
        f"{backbone}_upernet",
        title,
        dataclasses.replace(config, branches=tuple(map(with_own_grid, config.branches))),
        published,
        paper,
        backbone=backbone,
        table="UperNet (ADE20K)",
        head="upernet",
        schedule="160k" if note else "80k",
        note=note,
        pad_divisor=32,
        **_IMAGENET,
    )


# The smallest image has less than one window, hence global attention
_TSB = PIIPConfig(branches=(deit_branch("B", 336, None), deit_branch("S", 448, 28), deit_branch("T", 896, 28)))
_SBL = PIIPConfig(
    branches=(
        deit_branch("L", 336, None, pretrained_at=384),
        deit_branch("B", 448, 28, pretrained_at=384),
        deit_branch("S", 1120, 28, pretrained_at=384),
    )
)
_PAPER_ONLY = (
    "In the paper only: windows were found from the printed cost, and what it does not say is as in the released models"
)
_paper_upernet = partial(_upernet, note=_PAPER_ONLY)
_vit_upernet = partial(_upernet, note=f"{_PAPER_ONLY}. Windows of 28 cost what is printed but for the patch embedding")
_lh6b_upernet = partial(
    _upernet,
    note=f"{_PAPER_ONLY}. The printed #FLOPs lack 403G: ten of the twelve d x d products per token and layer of ViT-L, "
    "as in detection",
)
_UPERNET_ENTRIES = (
    _vit_upernet("vit_b_640", "ViT-B", single_branch(deit_branch("B", 640, 28)), paper=(None, None, None, 159, 51.0)),
    _paper_upernet("piip_tsb_896_448_336", "PIIP-TSB", _TSB, paper=(None, None, None, 118, 51.6)),
    _vit_upernet(
        "vit_l_640",
        "ViT-L",
        single_branch(deit_branch("L", 640, 28, pretrained_at=384)),
        paper=(None, None, None, 545, 53.6),
    ),
    _paper_upernet("piip_sbl_1120_448_336", "PIIP-SBL", _SBL, paper=(None, None, None, 456, 54.3)),
    _upernet(
        "internvit_6b_512", "InternViT-6B", single_branch(fused_mlp(internvit_6b(512))), (None, None, 5910, 6364, 58.42)
    ),
    _paper_upernet(
        "internvit_6b_windows_512",
        "InternViT-6B, windows of 14",
        windowed(single_branch(internvit_6b(512))),
        paper=(None, None, None, 6105, 58.36),
    ),
    _upernet("piip_h6b_512_192", "PIIP-H6B", h6b_speedup(192, 512), (None, None, 6745, 1663, 57.81)),
    _upernet("piip_h6b_512_256", "PIIP-H6B", h6b_speedup(256, 512), (None, None, 6745, 2354, 58.35)),
    _upernet("piip_h6b_512_384", "PIIP-H6B", h6b_speedup(384, 512), (None, None, 6746, 4374, 59.32)),
    _upernet("piip_h6b_512_512", "PIIP-H6B", h6b_speedup(512, 512), (None, None, 6747, 7308, 59.85)),
    *(
        _lh6b_upernet(_join("piip_lh6b", *sizes), "PIIP-LH6B", lh6b(*sizes), paper=(None, None, None, flops_g, miou))
        for sizes, flops_g, miou in (
            ((640, 512, 192), 1903, 57.82),
            ((640, 512, 256), 2592, 58.42),
            ((640, 512, 384), 4560, 59.65),
        )
    ),
)

ENTRIES = (
    *_DEIT_ENTRIES,
    *_LARGE_ENTRIES,
    *_PRETRAINING_ENTRIES,
    *_CONVNEXT_ENTRIES,
    *_CASCADE_ENTRIES,
    *_DINO_ENTRIES,
    *_UPERNET_ENTRIES,
)
"""All of them, in the order of the tables."""
