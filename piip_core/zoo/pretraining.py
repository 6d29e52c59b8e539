"""Mask R-CNN with PIIP-SBL 1568/1120/672 from other pretraining than DeiT III's 224-pixel weights."""

from __future__ import annotations

from ..config import BranchConfig, PIIPConfig
from .branches import LIGHT_INTERACTION, deit_branch, fused_mlp
from .entry import PublishedNumbers, ZooEntry
from .networks import AUGREG_384, BEIT, DINOV2, MAE, UNIPERCEIVER

__all__ = ["ENTRIES"]

TABLE = "More ViT variants (Mask R-CNN, 1x)"
_IMAGE_SIZES = {"S": 1568, "B": 1120, "L": 672}
_WINDOW = 28

# Stochastic depth where the published settings of a size are one family's as another's
_DROP_PATH = {"B": 0.15, "L": 0.4}
_STRONG_DROP_PATH = {"S": 0.2, "B": 0.3, "L": 0.4}


def _augreg(size: str) -> BranchConfig:
    name = {"S": "small", "B": "base", "L": "large"}[size]
    source = f"timm:vit_{name}_patch16_384.augreg_in21k_ft_in1k"
    return _branch(size, AUGREG_384, source, _STRONG_DROP_PATH)


def _uniperceiver(size: str) -> BranchConfig:
    file = {
        "B": "uni-perceiver-base-L12-H768-224size-torch-pretrained_converted.pth",
        "L": "uni-perceiver-large-L24-H1024-224size-pretrained_converted.pth",
    }[size]
    return _branch(size, UNIPERCEIVER, f"weights/{file}", _DROP_PATH)


def _mae(size: str) -> BranchConfig:
    source = {"B": "timm:vit_base_patch16_224.mae", "L": "timm:vit_large_patch16_224.mae"}[size]
    return _branch(size, MAE, source, _DROP_PATH)


def _dinov2(size: str) -> BranchConfig:
    name = {"S": "small", "B": "base", "L": "large"}[size]
    return _branch(size, DINOV2, f"timm:vit_{name}_patch14_dinov2.lvd142m", _STRONG_DROP_PATH)


def _beit(size: str) -> BranchConfig:
    name = {"B": "base", "L": "large"}[size]
    return _branch(size, BEIT, f"timm:beitv2_{name}_patch16_224.in1k_ft_in22k", _DROP_PATH)


def _branch(size: str, networks: dict, source: str, drop_path: dict[str, float]) -> BranchConfig:
    return BranchConfig(
        network=networks[size],
        image_size=_IMAGE_SIZES[size],
        window_size=_WINDOW,
        drop_path_rate=drop_path[size],
        drop_path_schedule="linear",
        pretrained=source,
    )


def _deit3(size: str) -> BranchConfig:
    return deit_branch(size, _IMAGE_SIZES[size], _WINDOW)


def _row(key: str, pretraining: str, makers: str, box_ap: float, mask_ap: float) -> ZooEntry:
    """`makers` names the function for L, B and S, Branch 1 first."""
    branches = tuple(_MAKERS[maker](size) for maker, size in zip(makers.split(), "LBS", strict=True))
    return ZooEntry(
        name=f"piip_sbl_{key}_1568_1120_672",
        title=f"PIIP-SBL, {pretraining}",
        table=TABLE,
        config=PIIPConfig(branches=branches),
        published=PublishedNumbers(box_ap=box_ap, mask_ap=mask_ap),
    )


_MAKERS = {
    "augreg": _augreg,
    "uniperceiver": _uniperceiver,
    "mae": _mae,
    "dinov2": _dinov2,
    "beit": _beit,
    "deit3": _deit3,
}


def _speedup_row() -> ZooEntry:
    """Released beside the AugReg model: lighter interactions, and MLPs that approximate GELU."""
    config = PIIPConfig(branches=tuple(map(fused_mlp, map(_augreg, "LBS"))), interaction=LIGHT_INTERACTION)
    name = "piip_sbl_augreg384_speedup_1568_1120_672"
    return ZooEntry(name=name, title="PIIP-SBL, AugReg (384), speed-up", table=TABLE, config=config)


ENTRIES = (
    _row("augreg384", "AugReg (384)", "augreg augreg augreg", 48.3, 42.6),
    _speedup_row(),
    _row("uniperceiver", "DeiT III (S) + Uni-Perceiver (BL)", "uniperceiver uniperceiver deit3", 48.8, 42.9),
    _row("mae", "DeiT III (S) + MAE (BL)", "mae mae deit3", 49.1, 43.0),
    # The table says DeiT III for S; the released configuration has DINOv2 there too
    _row("dinov2", "DINOv2", "dinov2 dinov2 dinov2", 51.0, 44.7),
    _row("beitv2", "DeiT III (S) + BEiTv2 (BL)", "beit beit deit3", 51.8, 45.4),
)
