"""PIIP-LLaVA and LLaVA-1.5: CLIP and ConvNeXt branches, a projector, a Vicuna."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..branches import ViTConfig
from ..config import BranchConfig, InteractionConfig, PIIPConfig
from .convnext import DEEP_SEGMENTS
from .networks import CLIP, CLIP_336, CLIP_PATCH14_336, CONVNEXT

__all__ = ["ENTRIES", "MultimodalEntry", "MultimodalScores"]


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
        training_data: Samples of both stages together, as printed.
        scores: Published.
        flops_g: Printed multiply-accumulates of the vision tower, in thousand millions.
        note: What to know about the printed numbers.
    """

    name: str
    title: str
    vision: PIIPConfig
    language_model: str
    embed_dim: int
    projector_norm: Literal["group", "layer", "none"] = "group"
    feature_block: int | None = None
    training_data: str = "1.2M"
    scores: MultimodalScores
    flops_g: float
    note: str = ""

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
        return "/".join(str(branch.image_size) for branch in reversed(self.vision.branches))


# Name and width of the language model
_VICUNA = {"7B": ("lmsys/vicuna-7b-v1.5", 4096), "13B": ("lmsys/vicuna-13b-v1.5", 5120)}
_CONVNEXT_WEIGHTS = {"B": "convnext_base.clip_laiona_augreg_320", "L": "convnext_large_mlp.clip_laion2b_ft_320"}
# Blocks before each interaction; those of CLIP, and of ConvNeXt before 2, are even
_CONVNEXT_SEGMENTS = {
    2: None,
    12: DEEP_SEGMENTS,
    24: (
        *((0, 1), (2, 2), (3, 4), (5, 6), (7, 9)),
        *(pair for first in range(10, 35, 3) for pair in ((first, first), (first + 1, first + 2))),
        (37, 38),
    ),
}
_WRONG_FLOPS = "The printed #FLOPs are those of the 7B model, which has 12 interactions; this one has 24"
_MORE_DATA = "The table prints 2.7M training samples, the paper's abstract 2.8M"
_TO_NAME = str.maketrans("-.", "__")


def _clip_branch(network: ViTConfig, image_size: int, weights: str) -> BranchConfig:
    return BranchConfig(network=network, image_size=image_size, pretrained=f"open_clip:{weights}-quickgelu/openai")


def _pyramid(last: BranchConfig, image_size: int, num_interactions: int) -> PIIPConfig:
    """With CLIP-L as Branch 1, which from 336 pixels on starts from the weights of that size."""
    at_224, at_336 = (CLIP["L"], image_size, "ViT-L-14"), (CLIP_336["L"], image_size, "ViT-L-14-336")
    return PIIPConfig(
        branches=(_clip_branch(*(at_224 if image_size < 336 else at_336)), last),
        interaction=InteractionConfig(num_interactions=num_interactions),
        merging=None,
    )


def _row(
    words: tuple[str, ...], vision: PIIPConfig, llm: str, flops_g: float, scores: tuple[float, ...], **options: Any
) -> MultimodalEntry:
    sizes = [branch.image_size for branch in reversed(vision.branches)] if len(vision.branches) > 1 else []
    language_model, embed_dim = _VICUNA[llm]
    return MultimodalEntry(
        name="_".join(map(str, (*words, *sizes, llm))).translate(_TO_NAME).lower(),
        title=" ".join(words),
        vision=vision,
        language_model=language_model,
        embed_dim=embed_dim,
        scores=MultimodalScores(*scores),
        flops_g=flops_g,
        **options,
    )


def _clip_row(
    image_sizes: tuple[int, int], num_interactions: int, llm: str, flops_g: float, scores: tuple[float, ...]
) -> MultimodalEntry:
    large, small = image_sizes
    vision = _pyramid(_clip_branch(CLIP["B"], large, "ViT-B-16"), small, num_interactions)
    return _row(("PIIP-LLaVA", "CLIP-BL"), vision, llm, flops_g, scores)


def _convnext_row(
    size: str,
    image_sizes: tuple[int, int],
    num_interactions: int,
    llm: str,
    flops_g: float,
    scores: tuple[float, ...],
    *,
    project: str = "PIIP-LLaVA",
    **options: Any,
) -> MultimodalEntry:
    large, small = image_sizes
    last = BranchConfig(
        network=CONVNEXT[size],
        image_size=large,
        segments=_CONVNEXT_SEGMENTS[num_interactions],
        pretrained=f"timm:{_CONVNEXT_WEIGHTS[size]}",
    )
    vision = _pyramid(last, small, num_interactions)
    return _row((project, f"ConvNeXt-{size}", "CLIP-L"), vision, llm, flops_g, scores, **options)


def _baseline_row(llm: str, flops_g: float, scores: tuple[float, ...]) -> MultimodalEntry:
    """LLaVA-1.5: CLIP-L with its own patches, features of the second-to-last layer, two linears without a norm."""
    branch = _clip_branch(CLIP_PATCH14_336["L"], 336, "ViT-L-14-336")
    return _row(
        ("LLaVA-1.5",),
        PIIPConfig(branches=(branch,), interaction=InteractionConfig(num_interactions=0), merging=None),
        llm,
        flops_g,
        scores,
        projector_norm="none",
        feature_block=branch.network.depth - 2,
    )


ENTRIES = (
    _baseline_row("7B", 191, (64.3, 31.1, 58.2, 66.8, 62.0, 78.5, 66.1, 85.9, 64.1)),
    _clip_row((512, 256), 2, "7B", 193, (63.8, 32.0, 57.9, 68.8, 62.8, 79.1, 67.3, 86.5, 64.8)),
    _convnext_row("B", (640, 224), 2, "7B", 191, (64.5, 31.9, 59.0, 68.3, 62.1, 79.9, 67.5, 86.5, 65.0)),
    _clip_row((512, 448), 12, "7B", 422, (66.2, 30.5, 59.5, 68.0, 63.7, 80.3, 69.0, 87.3, 65.6)),
    _convnext_row("B", (1024, 336), 12, "7B", 598, (67.5, 31.5, 63.1, 68.1, 62.7, 81.1, 69.0, 87.9, 66.4)),
    _convnext_row("L", (1024, 336), 12, "7B", 1037, (67.0, 31.4, 67.1, 68.3, 63.9, 81.5, 69.4, 88.2, 67.1)),
    _convnext_row(
        "L",
        (1024, 336),
        12,
        "7B",
        1037,
        (74.5, 44.7, 73.0, 95.0, 62.9, 82.3, 72.1, 87.5, 74.0),
        project="PIIP-LLaVA-Plus",
        training_data="2.7M",
        note=_MORE_DATA,
    ),
    _baseline_row("13B", 191, (67.7, 36.1, 61.3, 71.6, 63.3, 80.0, 68.2, 85.9, 66.8)),
    _clip_row((512, 448), 12, "13B", 422, (67.6, 36.1, 61.6, 71.0, 64.5, 81.2, 69.5, 87.2, 67.3)),
    _convnext_row(
        "B", (1024, 336), 24, "13B", 598, (68.5, 37.7, 64.2, 71.1, 64.2, 81.8, 69.3, 87.9, 68.0), note=_WRONG_FLOPS
    ),
    _convnext_row(
        "L", (1024, 336), 24, "13B", 1037, (66.5, 36.8, 69.2, 69.8, 65.2, 82.5, 70.5, 87.6, 68.5), note=_WRONG_FLOPS
    ),
)
