"""What is known about one published model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..config import PIIPConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DetectionEntry",
    "PublishedNumbers",
    "SegmentationEntry",
    "ZooEntry",
]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# COCO's usual largest image, and the crop that the multi-scale training of DETR takes at that size
_USUAL_LONG, _USUAL_SHORT, _USUAL_CROP = 1333, 800, 1024


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
    """One row of the published tables; see `DetectionEntry` and `SegmentationEntry`.

    Args:
        name: Name in this project, for example `piip_tsb_1568_1120_672`.
        backbone: Name of the backbone, where several rows share it; None for `name`.
        title: Name in the published table, without the image sizes.
        table: Published table that the row stands in.
        config: The backbone.
        note: What to know about the printed numbers.
        published: Numbers of the public repository's table.
        paper: Numbers of the paper where it prints others.
        pad_divisor: Images are padded with zeros, after normalisation, to a multiple of this.
        pixel_mean: Per channel, RGB.
        pixel_std: Per channel, RGB.
        layer_decay: Factor of the learning rate per layer, from the last layer down. None: no decay, and weight decay
            on all parameters.
        learning_rate: At `batch_size` images.
        weight_decay: Of all parameters but biases and one-dimensional ones.
        batch_size: Images per step, over all GPUs.
        warmup_iters: Length of the linear warmup.
        warmup_factor: Where the warmup starts, relative to the learning rate.
    """

    folder: ClassVar[str]
    """Where the Detectron2 configs of such rows are, below `projects/PIIP/configs`."""

    name: str
    title: str
    table: str
    config: PIIPConfig
    backbone: str | None = None
    note: str = ""
    published: PublishedNumbers = PublishedNumbers()
    paper: PublishedNumbers = PublishedNumbers()
    pad_divisor: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    layer_decay: float | None
    learning_rate: float
    weight_decay: float = 0.05
    batch_size: int = 16
    warmup_iters: int
    warmup_factor: float

    @property
    def head(self) -> str:
        """What follows the backbone: the first part of the config's name."""
        raise NotImplementedError

    @property
    def schedule(self) -> str:
        """Length of the training: the last part of the config's name."""
        raise NotImplementedError

    @property
    def config_name(self) -> str:
        """Name of the Detectron2 config."""
        return f"{self.head}_{self.backbone or self.name}_{self.schedule}"

    @property
    def config_file(self) -> str:
        """Detectron2 config, relative to `projects/PIIP/configs`."""
        return f"{self.folder}/{self.config_name}.py"

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published tables print them."""
        return "/".join(str(branch.image_size) for branch in reversed(self.config.branches))

    @property
    def training_size(self) -> tuple[int, int]:
        """Height and width of the largest (landscape) training image, before padding."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Depth of Branch 1, over which the learning rate decays."""
        return self.config.branches[0].network.depth

    @property
    def skip_strides(self) -> tuple[float, ...]:
        """Layers of Branch 1 per layer of each further branch."""
        return tuple(self.num_layers / branch.network.depth for branch in self.config.branches[1:])


@dataclass(frozen=True, kw_only=True)
class DetectionEntry(ZooEntry):
    """A detector trained on COCO.

    Args:
        detector: Detector around the backbone.
        image_scale: Long and short side that test images just fit into; None derives it from `training_crop` or from
            the largest size of a branch.
        training_crop: Side of the crop of DETR's multi-scale training, whose resizing follows in proportion
            (at 1024: short sides of 480 to 800); None trains at the test scale.
        epochs: Passes over the training images; 12 is the "1x" schedule.
        lr_drops: Epochs after which the learning rate falls to a tenth.
    """

    folder: ClassVar[str] = "COCO"

    detector: Literal["mask_rcnn", "cascade_mask_rcnn", "dino"] = "mask_rcnn"
    pad_divisor: int = 224
    pixel_mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    pixel_std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    image_scale: tuple[int, int] | None = None
    training_crop: int | None = None
    layer_decay: float | None = 0.85
    learning_rate: float = 1e-4
    epochs: int = 12
    lr_drops: tuple[int, ...] = (8, 11)
    warmup_iters: int = 500
    warmup_factor: float = 0.001

    @property
    def head(self) -> str:
        return self.detector

    @property
    def schedule(self) -> str:
        """Length of the training in units of 12 epochs, "ms" for multi-scale training: "1x", "3x_ms"."""
        return f"{self.epochs // 12}x" + ("_ms" if self.training_crop is not None else "")

    @property
    def training_size(self) -> tuple[int, int]:
        if self.training_crop is not None:
            return self.training_crop, self.training_crop
        return self.short_side, self.long_side

    @property
    def long_side(self) -> int:
        """Longest side of a resized test image."""
        return self._scale[0]

    @property
    def short_side(self) -> int:
        """Largest short side of a resized test image."""
        return self._scale[1]

    @property
    def _scale(self) -> tuple[int, int]:
        if self.image_scale is not None:
            return self.image_scale
        if self.training_crop is not None:
            return tuple(side * self.training_crop // _USUAL_CROP for side in (_USUAL_LONG, _USUAL_SHORT))
        side = self.config.branches[self.config.largest_image - 1].image_size
        return side, side * _USUAL_SHORT // _USUAL_LONG


@dataclass(frozen=True, kw_only=True)
class SegmentationEntry(ZooEntry):
    """An UperNet trained on ADE20K, on square crops of the largest image size.

    Args:
        iterations: Length of the training, over which the learning rate falls linearly to 0.
    """

    folder: ClassVar[str] = "ADE20K"

    pad_divisor: int = 32
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    layer_decay: float | None = 0.95
    learning_rate: float = 4e-5
    iterations: int = 80_000
    warmup_iters: int = 1500
    warmup_factor: float = 1e-6

    @property
    def head(self) -> str:
        return "upernet"

    @property
    def schedule(self) -> str:
        """Length of the training in thousand iterations: "80k"."""
        return f"{self.iterations // 1000}k"

    @property
    def training_size(self) -> tuple[int, int]:
        return self.crop_size, self.crop_size

    @property
    def crop_size(self) -> int:
        """Side of a training crop and of the window in inference; test images have this short side."""
        return self.config.branches[self.config.largest_image - 1].image_size

    @property
    def stride(self) -> int:
        """Step of the window in inference: two thirds of it."""
        return self.crop_size * 2 // 3
