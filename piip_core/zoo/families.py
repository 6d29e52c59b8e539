"""Families of networks that timm has, by size: DINOv3, SigLIP 2, Perception Encoder, EVA-02, C-RADIO.

No pyramid of them was published. Licences are those that timm names: `licence_of`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm

from ..branches import ConvNeXtConfig, NetworkConfig, TimmConfig
from ..config import BranchConfig, ClassifierConfig, MergingConfig, PIIPConfig
from ..errors import ConfigError, check
from .entry import ZooEntry
from .networks import CONVNEXT
from .pyramids import CONVNEXT_SEGMENTS, STAGED_MERGING, convnext_branch

FAMILIES: Mapping[str, Mapping[str, str]] = {
    # DINOv3 License: use is restricted, and who redistributes has to pass it on
    "dinov3": {
        "s": "vit_small_patch16_dinov3.lvd1689m",
        "s+": "vit_small_plus_patch16_dinov3.lvd1689m",
        "b": "vit_base_patch16_dinov3.lvd1689m",
        "l": "vit_large_patch16_dinov3.lvd1689m",
        "h+": "vit_huge_plus_patch16_dinov3.lvd1689m",
        "7b": "vit_7b_patch16_dinov3.lvd1689m",
    },
    "dinov3_convnext": {
        "t": "convnext_tiny.dinov3_lvd1689m",
        "s": "convnext_small.dinov3_lvd1689m",
        "b": "convnext_base.dinov3_lvd1689m",
        "l": "convnext_large.dinov3_lvd1689m",
    },
    # Apache 2.0
    "siglip2": {
        "b": "vit_base_patch16_siglip_512.v2_webli",
        "l": "vit_large_patch16_siglip_512.v2_webli",
        "so400m": "vit_so400m_patch16_siglip_512.v2_webli",
        "g": "vit_giantopt_patch16_siglip_384.v2_webli",
    },
    "pe_spatial": {
        "t": "vit_pe_spatial_tiny_patch16_512.fb",
        "s": "vit_pe_spatial_small_patch16_512.fb",
        "b": "vit_pe_spatial_base_patch16_512.fb",
        "l": "vit_pe_spatial_large_patch14_448.fb",
        "g": "vit_pe_spatial_gigantic_patch14_448.fb",
    },
    # MIT
    "eva02": {
        "t": "eva02_tiny_patch14_224.mim_in22k",
        "s": "eva02_small_patch14_224.mim_in22k",
        "b": "eva02_base_patch14_224.mim_in22k",
        "l": "eva02_large_patch14_224.mim_m38m",
    },
    # NVIDIA Open Model License
    "radio": {
        "b": "naflexvit_base_patch16_radio_v3.c_radio",
        "so400m": "naflexvit_so400m_patch16_radio_v4.c_radio",
        "h": "naflexvit_huge_patch16_radio_v4.c_radio",
    },
}
"""timm's names with those of the weights."""

_PATCH = 16  # what interactions and pyramids of maps like: kernels of 14 are resized


def parse(text: str) -> tuple[str, ...]:
    """Reads `dinov3:s,b,l`, `dinov3:l,dinov3_convnext:t` or names of timm's models, in any mixture.

    Returns:
        One `FAMILY:SIZE` or name for each.
    """
    family, found = "", []
    for part in text.split(","):
        if ":" in part:
            family = part.partition(":")[0]
        named = ":" in part or part not in FAMILIES.get(family, {})
        found.append(part if named else f"{family}:{part}")
    return tuple(found)


def weights_of(name: str) -> str:
    """timm's name, with that of the weights, of a network by `FAMILY:SIZE`; any other name stays as it is.

    Raises:
        ConfigError: If there is no such family or size.
    """
    family, colon, size = name.partition(":")
    if not colon:
        return name
    if size not in FAMILIES.get(family, {}):
        known = ", ".join(f"{key}:{','.join(sizes)}" for key, sizes in FAMILIES.items())
        raise ConfigError(f"network {name!r}: expected the name of a model of timm, or one of {known}")
    return FAMILIES[family][size]


def licence_of(name: str) -> str:
    """Licence of a network's weights as timm names it; empty where timm knows none."""
    found = timm.get_pretrained_cfg(weights_of(name), allow_unregistered=True)
    return (found and found.license) or ""


def network(name: str) -> NetworkConfig:
    """A network by `FAMILY:SIZE`, or by timm's name.

    Raises:
        ConfigError: If there is none, or it is none that a branch can have.
    """
    model = weights_of(name).partition(".")[0]
    if name.startswith("dinov3_convnext:"):
        return CONVNEXT[name.partition(":")[2].upper()]
    found = TimmConfig(name=model)
    return found if found.strides[0] in (4, _PATCH) else TimmConfig(name=model, patch_size=_PATCH)


def branch(name: str, image_size: int, *, window_size: int | None = None, frozen: bool = False) -> BranchConfig:
    """A branch of a network as from `network`, with the stochastic depth of published branches of that width."""
    net, weights = network(name), weights_of(name)
    pretrained = f"timm:{weights}" if "." in weights else None
    if isinstance(net, ConvNeXtConfig):
        rate = 0.4 if net.dims[-1] > CONVNEXT["S"].dims[-1] else 0.3
        size = name.partition(":")[2].upper()
        options: dict[str, Any] = {"drop_path_rate": rate, "segments": CONVNEXT_SEGMENTS[size], "frozen": frozen}
        return convnext_branch(size, image_size, pretrained, **options)
    width = net.dims[-1]
    return BranchConfig(
        network=net,
        image_size=image_size,
        window_size=None if net.no_windows else window_size,
        drop_path_rate=0.05 if width < 768 else 0.15 if width < 1024 else 0.4,
        pretrained=pretrained,
        frozen=frozen,
    )


def pyramid(
    networks: str, image_sizes: Sequence[int], *, window_size: int | None = None, frozen: bool = False
) -> PIIPConfig:
    """A pyramid of networks as `parse` reads them, largest image first, with 12 interactions.

    A ConvNeXt of DINOv3 brings the merging of the published pyramids of ConvNeXts.
    """
    names = parse(networks)
    check(len(names) == len(image_sizes), "image_sizes", image_sizes, f"{len(names)} sizes, one per network")
    pairs = reversed(list(zip(names, image_sizes, strict=True)))
    branches = tuple(branch(*pair, window_size=window_size, frozen=frozen) for pair in pairs)
    staged = any(isinstance(each.network, ConvNeXtConfig) for each in branches)
    return PIIPConfig(branches=branches, merging=STAGED_MERGING if staged else MergingConfig())


def label(names: Sequence[str]) -> str:
    """The shortest text that `parse` reads."""
    parts, last = [], ""
    for name in names:
        family, colon, size = name.partition(":")
        parts.append(size if colon and family == last else name)
        last = family if colon else ""
    return ",".join(parts)


def slug(networks: str, image_sizes: Sequence[int]) -> str:
    """Name of a pyramid in the style of the published ones: piip_dinov3_sbl_1568_1120_672."""
    sizes_joined = re.sub(r",(?=[^,:_]+(,|$))", "", networks).replace("+", "plus")
    return "_".join(["piip", re.sub(r"\W", "_", sizes_joined), *map(str, image_sizes)])


def entry(
    networks: str,
    image_sizes: Sequence[int],
    *,
    head: Literal["mask_rcnn", "cascade_mask_rcnn", "dino", "upernet"] = "mask_rcnn",
    window_size: int | None = None,
    frozen: bool = False,
    **facts: Any,
) -> ZooEntry:
    """What the recipes of detectors and segmentors take: a `pyramid`, and the statistics of images for Branch 1.

    `facts` are other fields of the entry.
    """
    statistics = timm.get_pretrained_cfg(weights_of(parse(networks)[-1]), allow_unregistered=True)
    mean, std = (tuple(255 * value for value in getattr(statistics, key)) for key in ("mean", "std"))
    name, title = slug(networks, image_sizes) + "_frozen" * frozen, f"PIIP {networks}" + ", frozen" * frozen
    config = pyramid(networks, image_sizes, window_size=window_size, frozen=frozen)
    defaults = {"name": name, "title": title, "config": config, "pixel_mean": mean, "pixel_std": std}
    return ZooEntry(**{**defaults, "head": head, **facts})


def classifier(networks: str, image_sizes: Sequence[int], *, frozen: bool = False) -> ClassifierConfig:
    """A classifier, whose heads read class tokens where all networks have one, and else the mean of the patches."""
    config = pyramid(networks, image_sizes, frozen=frozen)
    alone = PIIPConfig(branches=config.branches, merging=None)
    tokens = all(each.network.class_token for each in config.branches)
    return ClassifierConfig(pyramid=alone, pooling="class_token" if tokens else "average")
