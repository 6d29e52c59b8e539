"""Classifiers of ImageNet-1K: fine-tuned from DeiT and AugReg (released), and trained from scratch (in the paper)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..branches import ViTConfig
from ..config import BranchConfig, ClassifierConfig, InteractionConfig, PIIPConfig
from .branches import with_own_grid
from .networks import VIT

__all__ = ["ENTRIES", "ClassificationEntry", "ClassificationNumbers"]

_CHECKPOINTS = "https://huggingface.co/OpenGVLab/PIIP/resolve/main/classification/"


@dataclass(frozen=True, kw_only=True)
class ClassificationNumbers:
    """Numbers as printed in a published table; None where the table has none.

    Args:
        top1: Accuracy on ImageNet-1K's validation set, in percent.
        params_m: Parameters in millions, by the rule of the paper's tables (`piip_tools.flops.published_count`).
        flops_g: Multiply-accumulates in thousand millions, by the same rule.
    """

    top1: float
    params_m: float
    flops_g: float


@dataclass(frozen=True, kw_only=True)
class ClassificationEntry:
    """One published classifier of ImageNet-1K's 1000 classes. How it was trained stands in `config_file`.

    Args:
        name: Name in this project, for example `piip_tsb_368_192_128`.
        title: Name in the published table, without the image sizes.
        config: The classifier as published. Released ones read the first patch instead of the class token.
        training_config: What a new training starts from: the same with class tokens as their pretrained networks have
            them; None for `config`.
        published: Numbers of the table.
        checkpoint_url: The released file.
        note: What to know about the printed numbers.
        schedule: Length of the training in epochs: "20ep".
    """

    pad_divisor: ClassVar[int] = 1
    """Images are never padded."""

    name: str
    title: str
    config: ClassifierConfig
    training_config: ClassifierConfig | None = None
    published: ClassificationNumbers
    checkpoint_url: str | None = None
    note: str = ""
    schedule: str = "20ep"

    def __post_init__(self) -> None:
        if self.training_config is None:
            object.__setattr__(self, "training_config", self.config)

    @property
    def image_size(self) -> int:
        """Side of the square image in pixels."""
        return self.config.image_size

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published table prints them."""
        return "/".join(str(branch.image_size) for branch in reversed(self.config.pyramid.branches))

    @property
    def config_file(self) -> str:
        """Detectron2 config, relative to `projects/PIIP/configs`."""
        return f"ImageNet/{self.name}_{self.schedule}.py"


_NAMES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}


def _deit(size: str) -> tuple[ViTConfig, str]:
    return VIT[size], f"timm:deit_{_NAMES[size]}_patch16_224.fb_in1k"


def _augreg(size: str) -> tuple[ViTConfig, str]:
    network = dataclasses.replace(VIT[size], layer_scale=None)
    return network, f"timm:vit_{_NAMES[size]}_patch16_224.augreg_in21k_ft_in1k"


# Stochastic depth by size, the same in all blocks
_DROP_PATH = {"T": 0.05, "S": 0.05, "B": 0.2, "L": 0.4}


def _fine_tuned_row(
    sizes: str,
    image_sizes: tuple[int, ...],
    published: ClassificationNumbers,
    *,
    augreg: bool,
) -> ClassificationEntry:
    """A released row; `sizes` and `image_sizes` with the largest image first."""
    pretrained = _augreg if augreg else _deit
    branches = []
    for size, image_size in reversed(list(zip(sizes, image_sizes, strict=True))):
        network, source = pretrained(size)
        network = dataclasses.replace(network, class_token=True)
        rate = _DROP_PATH[size]
        branch = BranchConfig(network=network, image_size=image_size, drop_path_rate=rate, pretrained=source)
        branches.append(with_own_grid(branch))
    file = f"piip_3branch_{sizes.lower()}_{'-'.join(map(str, image_sizes))}_cls_token_{'augreg' if augreg else 'deit1'}"
    return ClassificationEntry(
        name="_".join(["piip", sizes.lower(), *map(str, image_sizes)]),
        title=f"PIIP-{sizes}",
        config=ClassifierConfig(pyramid=PIIPConfig(branches=tuple(branches), merging=None), pooling="first_patch"),
        training_config=ClassifierConfig(
            pyramid=PIIPConfig(branches=tuple(map(_with_class_position, branches)), merging=None)
        ),
        published=published,
        checkpoint_url=f"{_CHECKPOINTS}{file}.pth",
    )


def _with_class_position(branch: BranchConfig) -> BranchConfig:
    """The class token with its position, as in the pretrained network; the published models leave it out."""
    return dataclasses.replace(branch, network=dataclasses.replace(branch.network, class_position=True))


def _scratch_branch(embed_dim: int, num_heads: int, image_size: int, window_size: int | None) -> BranchConfig:
    """Layer scale and stochastic depth are those of DeiT III's ViT-B; the paper does not print them."""
    network = ViTConfig(embed_dim=embed_dim, depth=12, num_heads=num_heads, layer_scale=1e-4)
    return with_own_grid(
        BranchConfig(network=network, image_size=image_size, window_size=window_size, drop_path_rate=0.1)
    )


def _from_scratch_row() -> ClassificationEntry:
    branches = ((640, 8, 128, None), (320, 4, 256, None), (160, 2, 512, 16))
    pyramid = PIIPConfig(
        branches=tuple(_scratch_branch(*branch) for branch in branches),
        interaction=InteractionConfig(drop_path_rate=0.1),
        merging=None,
    )
    return ClassificationEntry(
        name="piip_b_512_256_128",
        title="PIIP-B, from scratch",
        config=ClassifierConfig(pyramid=pyramid, head="merged"),
        published=ClassificationNumbers(top1=82.7, params_m=100, flops_g=18.4),
        note="In the paper only: the windows of Branch 3 were found from the printed cost, and what it does not say is "
        "as in DeiT III",
        schedule="300ep",
    )


ENTRIES = (
    _fine_tuned_row("TSB", (368, 192, 128), ClassificationNumbers(top1=82.1, params_m=144, flops_g=17.4), augreg=False),
    _fine_tuned_row("SBL", (320, 160, 96), ClassificationNumbers(top1=85.2, params_m=489, flops_g=39.0), augreg=True),
    _fine_tuned_row("SBL", (384, 192, 128), ClassificationNumbers(top1=85.9, params_m=489, flops_g=61.2), augreg=True),
    _from_scratch_row(),
)
