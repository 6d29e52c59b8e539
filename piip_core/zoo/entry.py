"""What is known about one published model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import PIIPConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PublishedNumbers",
    "ZooEntry",
]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class PublishedNumbers:
    """Numbers as printed in a published table; None where the table has none.

    Args:
        box_ap: COCO box AP.
        mask_ap: COCO mask AP.
        miou: Mean intersection over union on ADE20K's validation set, one scale.
        params_m: Parameters in millions, by the rule of the paper's tables (`piip_tools.flops.published_count`).
        flops_g: Multiply-accumulates in thousand millions, by the same rule.
    """

    box_ap: float | None = None
    mask_ap: float | None = None
    miou: float | None = None
    params_m: float | None = None
    flops_g: float | None = None


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One published detector or segmentor. How it was trained stands in its Detectron2 config, `config_file`.

    Args:
        name: Name in this project, for example `piip_tsb_1568_1120_672`.
        title: Name in the published table, without the image sizes.
        table: Published table that the model stands in.
        config: The backbone.
        head: What follows the backbone.
        schedule: Length of the training: "1x" for 12 epochs of COCO, "80k" for iterations of ADE20K; "_ms" behind it
            for multi-scale training.
        backbone: First part of the names of models that share a backbone; None for `name`.
        note: What to know about the printed numbers.
        published: Numbers of the public repository's table.
        paper: Numbers of the paper where it prints others.
        pad_divisor: Images are padded with zeros, after normalisation, to a multiple of this.
        pixel_mean: Per channel, RGB.
        pixel_std: Per channel, RGB.
    """

    name: str
    title: str = ""
    table: str = ""
    config: PIIPConfig
    head: Literal["mask_rcnn", "cascade_mask_rcnn", "dino", "upernet"] = "mask_rcnn"
    schedule: str = "1x"
    backbone: str | None = None
    note: str = ""
    published: PublishedNumbers = PublishedNumbers()
    paper: PublishedNumbers = PublishedNumbers()
    pad_divisor: int = 224
    pixel_mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    pixel_std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    @property
    def config_name(self) -> str:
        """Name of the Detectron2 config."""
        return f"{self.head}_{self.backbone or self.name}_{self.schedule}"

    @property
    def config_file(self) -> str:
        """Detectron2 config, relative to `projects/PIIP/configs`."""
        return f"{'ADE20K' if self.head == 'upernet' else 'COCO'}/{self.config_name}.py"

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published tables print them."""
        return "/".join(str(branch.image_size) for branch in reversed(self.config.branches))

    @property
    def image_size(self) -> int:
        """Side of the largest branch's square image in pixels."""
        return self.config.branches[self.config.largest_image - 1].image_size
