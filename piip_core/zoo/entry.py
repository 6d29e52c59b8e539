"""What is known about one published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..config import BranchConfig, ClassifierConfig, PIIPConfig

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class PublishedNumbers:
    """Numbers as printed in a published table; None where the table has none.

    Args:
        box_ap: COCO box AP.
        mask_ap: COCO mask AP.
        params_m: Parameters in millions, by the rule of the paper's tables (`piip_tools.flops.published`).
        flops_g: GFLOPs, multiply-accumulates by the same rule.
        miou: Mean intersection over union on ADE20K's validation set, one scale.
    """

    box_ap: float | None = None
    mask_ap: float | None = None
    params_m: float | None = None
    flops_g: float | None = None
    miou: float | None = None


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One published detector or segmentor. How it was trained stands in its Detectron2 config, `config_file`.

    Args:
        name: Name in this project, for example `piip_tsb_1568_1120_672`.
        title: Name in the published table, without the image sizes.
        table: Published table that the model stands in.
        config: The backbone.
        head: What follows the backbone.
        schedule: Length of the training: "1x" for 12 epochs of COCO, "80k" for iterations of ADE20K; "_ms" after it
            for multi-scale training.
        folder: Of the config, below `projects/PIIP/configs`; "" for that of the data.
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
    folder: str = ""
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
        return f"{self.folder or ('ADE20K' if self.head == 'upernet' else 'COCO')}/{self.config_name}.py"

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published tables print them."""
        return _resolution(self.config.branches)

    @property
    def image_size(self) -> int:
        """Side of the largest branch's square image in pixels."""
        return self.config.branches[self.config.largest_image - 1].image_size


@dataclass(frozen=True)
class ClassificationNumbers:
    """Numbers as printed in a published table; None where it is not known what it prints.

    Args:
        top1: Accuracy on ImageNet-1K's validation set, in percent.
        params_m: As for `PublishedNumbers`.
        flops_g: As for `PublishedNumbers`.
    """

    top1: float | None
    params_m: float | None = None
    flops_g: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassificationEntry:
    """One published classifier of ImageNet-1K's 1000 classes. How it was trained stands in `config_file`.

    Args:
        name: Name in this project, for example `piip_tsb_368_192_128`.
        title: Name in the published table, without the image sizes.
        config: The classifier as published. Released ones read the first patch instead of the class token.
        training_config: What a new training starts from: the same with class tokens as their pretrained networks have
            them, or `config`.
        published: Numbers of the table.
        note: What to know about the printed numbers.
        schedule: Length of the training in epochs: "20ep".
        folder: Of the config, below `projects/PIIP/configs`.
    """

    pad_divisor: ClassVar[int] = 1
    """Images are never padded."""

    name: str
    title: str
    config: ClassifierConfig
    training_config: ClassifierConfig
    published: ClassificationNumbers
    note: str = ""
    schedule: str = "20ep"
    folder: str = "ImageNet"

    @property
    def image_size(self) -> int:
        """Side of the square image in pixels."""
        return self.config.image_size

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published table prints them."""
        return _resolution(self.config.pyramid.branches)

    @property
    def config_file(self) -> str:
        """Detectron2 config, relative to `projects/PIIP/configs`."""
        return f"{self.folder}/{self.name}_{self.schedule}.py"


@dataclass(frozen=True)
class MultimodalScores:
    """Scores of the eight published benchmarks and their mean, as printed."""

    mmbench: float
    mm_vet: float
    textvqa: float
    scienceqa_image: float
    gqa: float
    vqav2: float
    seed_image: float
    pope: float
    average: float


@dataclass(frozen=True, kw_only=True)
class MultimodalEntry:
    """One row of the published table of multimodal models.

    Args:
        name: Name in this project, for example `piip_llava_clip_bl_512_256_7b`.
        title: Name in the published table, without image sizes and language model.
        vision: Branches and interactions; `merging` is None, since the projector takes its place.
        language_model: Language model that training starts from.
        embed_dim: Width of the language model, and so of the visual tokens.
        projector_norm: Norm inside the projector; see `TokenMerging`.
        feature_block: Block of Branch 1 whose tokens are the features; None for the last. Only without interactions.
        max_pixels: Most pixels of an image at its own aspect ratio; None for square ones.
        options: Other fields of `llava_piip.PIIPLlavaConfig`.
        images: Settings of `llava_piip.PIIPImageProcessor`.
        chat_template: Name of the second stage's template, in `llava_piip.chat_templates`.
        training_data: Samples of both stages together, as printed.
        first_stage: What the first of the two training stages trains.
        scores: Published.
        flops_g: Printed GFLOPs (multiply-accumulates) of the vision tower.
        note: What to know about the printed numbers.
        table: Number of the paper's table, of a setting of its ablations.
    """

    name: str
    title: str
    vision: PIIPConfig
    language_model: str
    embed_dim: int
    projector_norm: Literal["group", "layer", "none"] = "group"
    feature_block: int | None = None
    max_pixels: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str = "vicuna_v1"
    training_data: str = "1.2M"
    first_stage: tuple[str, ...] = ("projector",)
    scores: MultimodalScores
    flops_g: float
    note: str = ""
    table: str = ""

    @property
    def image_size(self) -> int:
        """Side of the square image in pixels, that of the last branch."""
        return self.vision.branches[-1].image_size

    @property
    def grid(self) -> int:
        """Side of the grid of visual tokens."""
        return self.image_size // self.vision.branches[-1].network.strides[-1]

    @property
    def image_seq_length(self) -> int:
        """Visual tokens per image."""
        return self.grid**2

    @property
    def resolution(self) -> str:
        """Image sizes, largest first, as the published table prints them."""
        return _resolution(self.vision.branches)


def _resolution(branches: Sequence[BranchConfig]) -> str:
    return "/".join(str(branch.image_size) for branch in reversed(branches))
