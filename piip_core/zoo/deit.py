"""Mask R-CNN with DeiT and DeiT III branches."""

from __future__ import annotations

import dataclasses

from ..config import InteractionConfig, MergingConfig, PIIPConfig
from ..errors import ConfigError
from .branches import deit_branch
from .entry import PublishedNumbers, ZooEntry
from .networks import VIT

__all__ = ["ENTRIES", "baseline", "deit_pyramid", "tsbl_as_released"]

TABLE = "DeiT-based models (Mask R-CNN, 1x)"


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
    windows = (14, 14, None) * (VIT[size].depth // 3)
    return PIIPConfig(
        branches=(deit_branch(size, image_size, windows),),
        interaction=InteractionConfig(num_interactions=0),
        merging=MergingConfig(kind="single", pyramid_norm="layer"),
    )


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


def _baseline_row(size: str, image_size: int, published: PublishedNumbers, paper: PublishedNumbers) -> ZooEntry:
    return ZooEntry(
        name=f"vit_{size.lower()}_{image_size}",
        title=f"ViT-{size}",
        table=TABLE,
        config=baseline(size, image_size),
        published=published,
        paper=paper,
        pad_divisor=64,
    )


def _pyramid_row(
    sizes: str,
    image_sizes: tuple[int, ...],
    window_size: int,
    published: PublishedNumbers,
    paper: PublishedNumbers | None = None,
) -> ZooEntry:
    return ZooEntry(
        name="_".join(["piip", sizes.lower(), *map(str, image_sizes)]),
        title=f"PIIP-{sizes}",
        table=TABLE,
        config=deit_pyramid(sizes, image_sizes, window_size),
        published=published,
        paper=paper or PublishedNumbers(),
    )


def _numbers(
    box_ap: float | None = None,
    mask_ap: float | None = None,
    params_m: float | None = None,
    flops_g: float | None = None,
) -> PublishedNumbers:
    return PublishedNumbers(box_ap=box_ap, mask_ap=mask_ap, params_m=params_m, flops_g=flops_g)


ENTRIES = (
    _baseline_row("B", 1024, _numbers(43.7, 39.7, 90, 463), _numbers(43.8, 39.9)),
    _pyramid_row("TSB", (1120, 896, 448), 14, _numbers(43.6, 38.7, 146, 243), _numbers(43.9, 38.6)),
    _pyramid_row("TSB", (1568, 896, 448), 14, _numbers(45.0, 40.3, 147, 287), _numbers(None, 40.2)),
    _pyramid_row("TSB", (1568, 1120, 672), 14, _numbers(46.5, 41.3, 149, 453), _numbers(46.6, 41.4)),
    _baseline_row("L", 1024, _numbers(46.7, 42.5, 308, 1542), _numbers(46.8)),
    _pyramid_row("SBL", (1120, 672, 448), 28, _numbers(46.5, 40.8, 493, 727), _numbers(46.7)),
    _pyramid_row("SBL", (1344, 896, 448), 28, _numbers(48.3, 42.7, 495, 1002), _numbers(48.2, 42.5)),
    _pyramid_row("SBL", (1568, 896, 672), 28, _numbers(49.3, 43.7, 497, 1464), _numbers(49.4)),
    _pyramid_row("SBL", (1568, 1120, 672), 28, _numbers(50.0, 44.4)),
    _pyramid_row("TSBL", (1344, 896, 672, 448), 28, _numbers(47.1, 41.9, 506, 755), _numbers(46.9, 41.6)),
    _pyramid_row("TSBL", (1568, 1120, 672, 448), 28, _numbers(48.2, 42.9, 507, 861), _numbers(None, 42.8)),
    _pyramid_row("TSBL", (1792, 1568, 1120, 448), 28, _numbers(49.4, 44.1, 512, 1535), _numbers(49.6, 44.2)),
)
