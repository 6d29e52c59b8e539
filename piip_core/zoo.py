"""Published models by name: their configuration, how they were trained, and the numbers published for them.

This is the one place for facts about published models; Detectron2 configs and the tables of the READMEs read it.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from .config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig
from .errors import ConfigError

__all__ = [
    "VIT",
    "PublishedNumbers",
    "ZooEntry",
    "baseline",
    "deit_pyramid",
    "entries",
    "get",
    "names",
    "tsbl_as_released",
]

VIT = {
    "T": ViTConfig(embed_dim=192, depth=12, num_heads=3),
    "S": ViTConfig(embed_dim=384, depth=12, num_heads=6),
    "B": ViTConfig(embed_dim=768, depth=12, num_heads=12),
    "L": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
}
"""Plain ViT of each size. DeiT (v1) has no layer scale; the published models give it one that starts at 1."""

# per size: pretrained weights (ViT-T is DeiT, the others DeiT III from ImageNet-21k) and stochastic depth
_DEIT = {
    "T": ("timm:deit_tiny_patch16_224.fb_in1k", 0.05),
    "S": ("timm:deit3_small_patch16_224.fb_in22k_ft_in1k", 0.05),
    "B": ("timm:deit3_base_patch16_224.fb_in22k_ft_in1k", 0.15),
    "L": ("timm:deit3_large_patch16_224.fb_in22k_ft_in1k", 0.4),
}


@dataclass(frozen=True, kw_only=True)
class PublishedNumbers:
    """Numbers as printed in a published table; None where the table has none.

    Args:
        box_ap: COCO box AP.
        mask_ap: COCO mask AP.
        params_m: Parameters in millions, by the rule of `piip_core.flops.published_count`.
        flops_g: Multiply-accumulates in thousand millions, by the same rule.
    """

    box_ap: float | None = None
    mask_ap: float | None = None
    params_m: float | None = None
    flops_g: float | None = None


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One row of the published tables.

    Args:
        name: Name in this project, for example `piip_tsb_1568_1120_672`.
        title: Name in the published table.
        config: The backbone.
        published: Numbers of the public repository's table.
        paper: Numbers of the paper where it prints others.
        detector: Detector around the backbone.
        pad_divisor: Images are padded with zeros, after normalisation, to a multiple of this.
        pixel_mean: Per channel, RGB.
        pixel_std: Per channel, RGB.
        layer_decay: Factor of the learning rate per layer, from the last layer down.
        learning_rate: At `batch_size` images.
        weight_decay: Of all parameters but biases and one-dimensional ones.
        batch_size: Images per step, over all GPUs.
        epochs: Passes over the training images; 12 is the "1x" schedule.
        lr_drops: Epochs after which the learning rate falls to a tenth.
        warmup_iters: Length of the linear warmup.
        warmup_factor: Where the warmup starts, relative to the learning rate.
    """

    name: str
    title: str
    config: PIIPConfig
    published: PublishedNumbers
    paper: PublishedNumbers = PublishedNumbers()
    detector: str = "Mask R-CNN"
    pad_divisor: int = 224
    pixel_mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    pixel_std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    layer_decay: float = 0.85
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    batch_size: int = 16
    epochs: int = 12
    lr_drops: tuple[int, ...] = (8, 11)
    warmup_iters: int = 500
    warmup_factor: float = 0.001

    @property
    def long_side(self) -> int:
        """Longest side of a resized image: the size of the last branch."""
        return self.config.branches[-1].image_size

    @property
    def short_side(self) -> int:
        """Largest short side of a resized image, in COCO's usual 1333 x 800 proportion."""
        return self.long_side * 800 // 1333

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published tables print them."""
        return "/".join(str(branch.image_size) for branch in reversed(self.config.branches))

    @property
    def config_file(self) -> str:
        """Detectron2 config, relative to `projects/PIIP/configs`."""
        return f"COCO/mask_rcnn_{self.name}_1x.py"

    @property
    def num_layers(self) -> int:
        """Depth of Branch 1, over which the learning rate decays."""
        return self.config.branches[0].network.depth

    @property
    def skip_strides(self) -> tuple[float, ...]:
        """Layers of Branch 1 per layer of each further branch."""
        return tuple(self.num_layers / branch.network.depth for branch in self.config.branches[1:])


def _deit_branch(size: str, image_size: int, window_size: int | tuple[int | None, ...]) -> BranchConfig:
    pretrained, drop_path_rate = _DEIT[size]
    return BranchConfig(
        network=VIT[size],
        image_size=image_size,
        window_size=window_size,
        drop_path_rate=drop_path_rate,
        pretrained=pretrained,
    )


def deit_pyramid(sizes: str, image_sizes: tuple[int, ...], window_size: int) -> PIIPConfig:
    """Published PIIP of DeiT branches, all windowed, with 12 interactions.

    Args:
        sizes: Model sizes as in the published names, smallest first, for example "TSB". The last is Branch 1.
        image_sizes: Image side of each, largest first.
        window_size: Side of the attention windows in tokens.
    """
    pairs = list(zip(sizes, image_sizes, strict=True))
    return PIIPConfig(branches=tuple(_deit_branch(size, side, window_size) for size, side in reversed(pairs)))


def baseline(size: str, image_size: int) -> PIIPConfig:
    """Published single-branch ViT: two windowed blocks, then a global one, and so on."""
    windows = (14, 14, None) * (VIT[size].depth // 3)
    return PIIPConfig(
        branches=(_deit_branch(size, image_size, windows),),
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
        title=f"ViT-{size} {image_size}",
        config=baseline(size, image_size),
        published=published,
        paper=paper,
        pad_divisor=64,
        layer_decay=0.95,
    )


def _pyramid_row(
    sizes: str,
    image_sizes: tuple[int, ...],
    published: PublishedNumbers,
    paper: PublishedNumbers = PublishedNumbers(),
) -> ZooEntry:
    return ZooEntry(
        name="_".join(["piip", sizes.lower(), *map(str, image_sizes)]),
        title=f"PIIP-{sizes} {'/'.join(map(str, image_sizes))}",
        config=deit_pyramid(sizes, image_sizes, window_size=14 if sizes == "TSB" else 28),
        published=published,
        paper=paper,
    )


def _numbers(
    box_ap: float | None = None,
    mask_ap: float | None = None,
    params_m: float | None = None,
    flops_g: float | None = None,
) -> PublishedNumbers:
    return PublishedNumbers(box_ap=box_ap, mask_ap=mask_ap, params_m=params_m, flops_g=flops_g)


_ENTRIES = (
    _baseline_row("B", 1024, _numbers(43.7, 39.7, 90, 463), _numbers(43.8, 39.9)),
    _pyramid_row("TSB", (1120, 896, 448), _numbers(43.6, 38.7, 146, 243), _numbers(43.9, 38.6)),
    _pyramid_row("TSB", (1568, 896, 448), _numbers(45.0, 40.3, 147, 287), _numbers(None, 40.2)),
    _pyramid_row("TSB", (1568, 1120, 672), _numbers(46.5, 41.3, 149, 453), _numbers(46.6, 41.4)),
    _baseline_row("L", 1024, _numbers(46.7, 42.5, 308, 1542), _numbers(46.8)),
    _pyramid_row("SBL", (1120, 672, 448), _numbers(46.5, 40.8, 493, 727), _numbers(46.7)),
    _pyramid_row("SBL", (1344, 896, 448), _numbers(48.3, 42.7, 495, 1002), _numbers(48.2, 42.5)),
    _pyramid_row("SBL", (1568, 896, 672), _numbers(49.3, 43.7, 497, 1464), _numbers(49.4)),
    _pyramid_row("SBL", (1568, 1120, 672), _numbers(50.0, 44.4)),
    _pyramid_row("TSBL", (1344, 896, 672, 448), _numbers(47.1, 41.9, 506, 755), _numbers(46.9, 41.6)),
    _pyramid_row("TSBL", (1568, 1120, 672, 448), _numbers(48.2, 42.9, 507, 861), _numbers(None, 42.8)),
    _pyramid_row("TSBL", (1792, 1568, 1120, 448), _numbers(49.4, 44.1, 512, 1535), _numbers(49.6, 44.2)),
)
_BY_NAME = {entry.name: entry for entry in _ENTRIES}


def entries() -> tuple[ZooEntry, ...]:
    """All published models, in the order of the tables."""
    return _ENTRIES


def names() -> list[str]:
    """Names of all published models, in the order of the tables."""
    return list(_BY_NAME)


def get(name: str) -> ZooEntry:
    """A published model by name.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        close = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4) or _BY_NAME
        raise ConfigError(f"no published model is named {name!r}; close matches are {', '.join(close)}") from None
