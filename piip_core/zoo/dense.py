"""Published detectors and segmentors, a row of their tables a line."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from ..config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from ..errors import ConfigError
from .entry import IMAGENET_MEAN, IMAGENET_STD, PublishedNumbers, ZooEntry
from .networks import (
    AUGREG_384,
    BEIT,
    CONVNEXT,
    DEEP_SEGMENTS,
    DINOV2,
    LIGHT_INTERACTION,
    MAE,
    TIMM_SIZES,
    UNIPERCEIVER,
    VIT,
    deit_branch,
    fused_mlp,
    internvit_6b,
    mae_h,
    with_own_grid,
)

_Numbers = tuple[float | None, ...]  # of `PublishedNumbers`: box AP, mask AP, millions of parameters, GFLOPs, mIoU

_IMAGENET: dict[str, Any] = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


def deit_pyramid(sizes: str, image_sizes: tuple[int, ...], window_size: int | None) -> PIIPConfig:
    """Published PIIP of DeiT branches, all windowed, with 12 interactions.

    Args:
        sizes: Model sizes as in the published names, smallest first, for example "TSB". The last is Branch 1.
        image_sizes: Image side of each, largest first.
        window_size: Side of the attention windows in tokens.
    """
    pairs = list(zip(sizes, image_sizes, strict=True))
    return PIIPConfig(branches=tuple(deit_branch(size, side, window_size) for size, side in reversed(pairs)))


def baseline(size: str, image_size: int) -> PIIPConfig:
    """Published single-branch ViT: two windowed blocks, then a global one, and so on."""
    return _single(deit_branch(size, image_size, (14, 14, None) * (VIT[size].depth // 3)))


def tsbl_as_released(config: PIIPConfig) -> PIIPConfig:
    """The network that the public four-branch code builds: Branch 4 is a second copy of Branch 3's model.

    The public class reads only image size and segments from the settings of Branch 4. The published parameter and
    FLOP counts are of the configured ViT-T; a checkpoint trained with the public code has 384-wide
    `branch4.patch_embed.proj.weight` and needs this configuration.

    Raises:
        ConfigError: If `config` has not four branches.
    """
    if len(config.branches) != 4:
        raise ConfigError(f"config has {len(config.branches)} branches: expected 4, as in the piip_tsbl_* models")
    *rest, third, fourth = config.branches
    fourth = dataclasses.replace(third, image_size=fourth.image_size, segments=fourth.segments)
    return dataclasses.replace(config, branches=(*rest, third, fourth))


def _single(branch: BranchConfig, **merging: Any) -> PIIPConfig:
    return PIIPConfig(
        branches=(branch,),
        interaction=InteractionConfig(num_interactions=0),
        merging=MergingConfig(kind="single", **(merging or {"pyramid_norm": "layer"})),
    )


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
    sizes: str, window_size: int, image_sizes: tuple[int, ...], published: _Numbers, paper: _Numbers = ()
) -> ZooEntry:
    config = deit_pyramid(sizes, image_sizes, window_size)
    return _entry(_join("piip", sizes, *image_sizes), f"PIIP-{sizes}", config, published, paper, table=_DEIT)


_DEIT = "DeiT-based models (Mask R-CNN, 1x)"
_DEIT_ENTRIES = (
    _vit("B", 1024, (43.7, 39.7, 90, 463), (43.8, 39.9)),
    _piip("TSB", 14, (1120, 896, 448), (43.6, 38.7, 146, 243), (43.9, 38.6)),
    _piip("TSB", 14, (1568, 896, 448), (45.0, 40.3, 147, 287), (None, 40.2)),
    _piip("TSB", 14, (1568, 1120, 672), (46.5, 41.3, 149, 453), (46.6, 41.4)),
    _vit("L", 1024, (46.7, 42.5, 308, 1542), (46.8,)),
    _piip("SBL", 28, (1120, 672, 448), (46.5, 40.8, 493, 727), (46.7,)),
    _piip("SBL", 28, (1344, 896, 448), (48.3, 42.7, 495, 1002), (48.2, 42.5)),
    _piip("SBL", 28, (1568, 896, 672), (49.3, 43.7, 497, 1464), (49.4,)),
    _piip("SBL", 28, (1568, 1120, 672), (50.0, 44.4)),
    _piip("TSBL", 28, (1344, 896, 672, 448), (47.1, 41.9, 506, 755), (46.9, 41.6)),
    _piip("TSBL", 28, (1568, 1120, 672, 448), (48.2, 42.9, 507, 861), (None, 42.8)),
    _piip("TSBL", 28, (1792, 1568, 1120, 448), (49.4, 44.1, 512, 1535), (49.6, 44.2)),
)


def _lh6b(image_size: int) -> PIIPConfig:
    """The paper's three-branch models (Table IV), all windowed; `image_size` is that of InternViT-6B."""
    branches = (internvit_6b(image_size), mae_h(1024), deit_branch("L", 1280, None, pretrained_at=384))
    return PIIPConfig(branches=tuple(dataclasses.replace(branch, window_size=14) for branch in branches))


def _lh6b_speedup() -> PIIPConfig:
    """The released three-branch models with InternViT-6B: four interactions, global attention."""
    branches = (internvit_6b(512), mae_h(1024, segments=None), deit_branch("L", 1536, None, pretrained_at=384))
    return PIIPConfig(
        branches=tuple(map(fused_mlp, branches)),
        interaction=dataclasses.replace(LIGHT_INTERACTION, num_interactions=4),
    )


def _h6b(image_size: int, largest: int) -> PIIPConfig:
    return PIIPConfig(branches=(internvit_6b(image_size), mae_h(largest)))


def _h6b_speedup(image_size: int, largest: int) -> PIIPConfig:
    branches = _h6b(image_size, largest).branches
    return PIIPConfig(branches=tuple(map(fused_mlp, branches)), interaction=LIGHT_INTERACTION)


_large = partial(_entry, table="InternViT-6B (Mask R-CNN, 1x)", schedule="1x_ms", pad_divisor=64)
_global = partial(_large, note="The released model attends globally (29323G); the paper counts windows of 14 (24418G)")
_paper_lh6b = partial(
    _large, note="The printed #FLOPs lack 1611G: ten of the twelve d x d products per token and layer of ViT-L"
)
_LARGE_ENTRIES = (
    _global(
        "internvit_6b_1024",
        "InternViT-6B",
        _single(internvit_6b(1024)),
        (53.8, 48.1, 5919, 29323),
        (None, None, None, 24418),
    ),
    _large("piip_h6b_1024_512", "PIIP-H6B", _h6b(512, 1024), (55.8, 49.0, 6872, 11080)),
    _large("piip_h6b_speedup_1024_512", "PIIP-H6B (speed-up)", _h6b_speedup(512, 1024)),
    _paper_lh6b("piip_lh6b_1280_1024_256", "PIIP-LH6B", _lh6b(256), paper=(53.5, 47.5, 7269, 5643)),
    _paper_lh6b("piip_lh6b_1280_1024_512", "PIIP-LH6B", _lh6b(512), paper=(54.4, 47.8, 7271, 10368)),
    _paper_lh6b("piip_lh6b_1280_1024_640", "PIIP-LH6B", _lh6b(640), paper=(55.7, 49.0, 7273, 13911)),
    _large("piip_lh6b_1536_1024_512", "PIIP-LH6B", _lh6b_speedup()),
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

# Blocks before each of the 12 interactions: downsampling goes with the stage after it
_CONVNEXT_SEGMENTS = {
    "T": ((0, 2), (3, 6), (7, 8), *((block, block) for block in range(9, 17)), (17, 20)),
    "S": DEEP_SEGMENTS,
    "B": DEEP_SEGMENTS,
}


def _convnext_branch(size: str, image_size: int, **options: Any) -> BranchConfig:
    weights = f"timm:convnext_{TIMM_SIZES[size]}.fb_in1k"
    network = CONVNEXT[size]
    return BranchConfig(
        network=network, image_size=image_size, drop_path_schedule="linear", pretrained=weights, **options
    )


def hybrid_pyramid(kinds: str) -> PIIPConfig:
    """Published pyramid of T at 1024, S at 672 and B at 448 pixels with intermediate merging.

    Args:
        kinds: Per branch, T first, "C" for ConvNeXt or "V" for ViT, for example "CVV".
    """
    branches: list[BranchConfig] = []
    for kind, size, image_size in zip(kinds, "TSB", (1024, 672, 448), strict=True):
        if kind == "V":
            branch = deit_branch(size, image_size, 14)
        else:
            rate = 0.4 if size == "B" else 0.3
            branch = _convnext_branch(size, image_size, drop_path_rate=rate, segments=_CONVNEXT_SEGMENTS[size])
        branches.insert(0, branch)
    # Where ConvNeXt ends a stage: one map for each of the strides 4, 8 and 16
    return PIIPConfig(branches=tuple(branches), merging=MergingConfig(kind="regular", intermediate_after=(0, 1, 10)))


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
        _single(_convnext_branch("B", 1024), out_blocks=CONVNEXT["B"].last_blocks()),
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
        note="The paper prints no image sizes for these models; those here are of the largest models of its Table I",
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
    backbone: str, title: str, config: PIIPConfig, schedule: str, published: _Numbers = (), **facts: Any
) -> ZooEntry:
    # DINO makes its coarsest level itself and does without the finest
    config = dataclasses.replace(config, merging=MergingConfig(out_strides=(8, 16, 32)))
    facts |= {"table": "DINO (COCO, multi-scale training)", "head": "dino", "backbone": backbone, "schedule": schedule}
    return _entry(f"{backbone}_dino", title, config, published, **facts)


def _dino_sbl() -> PIIPConfig:
    """Every third block is global."""
    sizes = (("L", 672), ("B", 1120), ("S", 1792))
    windows = {size: (24, 24, None) * (VIT[size].depth // 3) for size, _ in sizes}
    branches = (deit_branch(size, side, windows[size], pretrained_at=384) for size, side in sizes)
    return PIIPConfig(branches=tuple(branches))


_DINO_ENTRIES = (
    _dino("piip_sbl_1792_1120_672", "PIIP-SBL, DeiT III (384)", _dino_sbl(), "3x_ms", (57.8,), **_IMAGENET),
    _dino("piip_h6b_1024_768", "PIIP-H6B", _h6b(768, 1024), "1x_ms", (60.0,), pad_divisor=64),
    _dino("piip_lh6b_1536_1024_512", "PIIP-LH6B", _lh6b_speedup(), "2x_ms", pad_divisor=64),
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
_paper_upernet = partial(
    _upernet,
    note="In the paper only: windows were found from the printed cost, and what it does not say is as in the released "
    "models",
)
_UPERNET_ENTRIES = (
    _paper_upernet("piip_tsb_896_448_336", "PIIP-TSB", _TSB, paper=(None, None, None, 118, 51.6)),
    _paper_upernet("piip_sbl_1120_448_336", "PIIP-SBL", _SBL, paper=(None, None, None, 456, 54.3)),
    _upernet(
        "internvit_6b_512",
        "InternViT-6B",
        _single(fused_mlp(internvit_6b(512))),
        (None, None, 5910, 6364, 58.42),
        (None, None, None, 6105, 58.36),
    ),
    _upernet("piip_h6b_512_192", "PIIP-H6B", _h6b_speedup(192, 512), (None, None, 6745, 1663, 57.81)),
    _upernet("piip_h6b_512_256", "PIIP-H6B", _h6b_speedup(256, 512), (None, None, 6745, 2354, 58.35)),
    _upernet("piip_h6b_512_384", "PIIP-H6B", _h6b_speedup(384, 512), (None, None, 6746, 4374, 59.32)),
    _upernet("piip_h6b_512_512", "PIIP-H6B", _h6b_speedup(512, 512), (None, None, 6747, 7308, 59.85)),
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
