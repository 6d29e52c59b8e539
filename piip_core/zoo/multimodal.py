"""PIIP-LLaVA and LLaVA-1.5: CLIP and ConvNeXt branches, a projector, a Vicuna."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from ..branches import ViTConfig
from ..config import BranchConfig, InteractionConfig, PIIPConfig
from .entry import MultimodalEntry, MultimodalScores
from .networks import CLIP, CLIP_336, CLIP_PATCH14_336, CONVNEXT, DEEP_SEGMENTS

# Width of the language model
_VICUNA = {"7B": 4096, "13B": 5120}
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
_TO_NAME = str.maketrans("-. ", "___")


def _clip_branch(network: ViTConfig, image_size: int, weights: str) -> BranchConfig:
    return BranchConfig(network=network, image_size=image_size, pretrained=f"open_clip:{weights}-quickgelu/openai")


def _entry(title: str, vision: PIIPConfig, llm: str, flops_g: float, *scores: float, **options: Any) -> MultimodalEntry:
    sizes = [branch.image_size for branch in reversed(vision.branches)] if len(vision.branches) > 1 else []
    return MultimodalEntry(
        name="_".join(map(str, (title, *sizes, llm))).translate(_TO_NAME).lower(),
        title=title,
        vision=vision,
        language_model=f"lmsys/vicuna-{llm.lower()}-v1.5",
        embed_dim=_VICUNA[llm],
        scores=MultimodalScores(*scores),
        flops_g=flops_g,
        **options,
    )


def _piip(
    last: str, image_sizes: tuple[int, int], num_interactions: int, *numbers: Any, project: str = "", **options: Any
) -> MultimodalEntry:
    """A pyramid of CLIP-L, which from 336 pixels on starts from the weights of that size, below `last`."""
    large, small = image_sizes
    first = (CLIP["L"], small, "ViT-L-14") if small < 336 else (CLIP_336["L"], small, "ViT-L-14-336")
    if last == "CLIP-B":
        branch, title = _clip_branch(CLIP["B"], large, "ViT-B-16"), "CLIP-BL"
    else:
        size, title = last[-1], f"{last} CLIP-L"
        branch = BranchConfig(
            network=CONVNEXT[size],
            image_size=large,
            segments=_CONVNEXT_SEGMENTS[num_interactions],
            pretrained=f"timm:{_CONVNEXT_WEIGHTS[size]}",
        )
    vision = PIIPConfig(
        branches=(_clip_branch(*first), branch),
        interaction=InteractionConfig(num_interactions=num_interactions),
        merging=None,
    )
    return _entry(f"PIIP-LLaVA{project} {title}", vision, *numbers, **options)


# CLIP-L with its own patches, features of the second-to-last layer, two linears without a norm
_LLAVA = PIIPConfig(
    branches=(_clip_branch(CLIP_PATCH14_336["L"], 336, "ViT-L-14-336"),),
    interaction=InteractionConfig(num_interactions=0),
    merging=None,
)
_llava = partial(_entry, "LLaVA-1.5", _LLAVA, projector_norm="none", feature_block=CLIP_PATCH14_336["L"].depth - 2)
_plus = partial(
    _piip,
    project="-Plus",
    training_data="2.7M",
    note="The table prints 2.7M training samples, the paper's abstract 2.8M",
)
_deeper = partial(
    _piip, note="The printed #FLOPs are those of the 7B model, which has 12 interactions; this one has 24"
)
# Last branch, image sizes, interactions, language model, GFLOPs, and scores in the order of `MultimodalScores`
ENTRIES = (
    _llava("7B", 191, 64.3, 31.1, 58.2, 66.8, 62.0, 78.5, 66.1, 85.9, 64.1),
    _piip("CLIP-B", (512, 256), 2, "7B", 193, 63.8, 32.0, 57.9, 68.8, 62.8, 79.1, 67.3, 86.5, 64.8),
    _piip("ConvNeXt-B", (640, 224), 2, "7B", 191, 64.5, 31.9, 59.0, 68.3, 62.1, 79.9, 67.5, 86.5, 65.0),
    _piip("CLIP-B", (512, 448), 12, "7B", 422, 66.2, 30.5, 59.5, 68.0, 63.7, 80.3, 69.0, 87.3, 65.6),
    _piip("ConvNeXt-B", (1024, 336), 12, "7B", 598, 67.5, 31.5, 63.1, 68.1, 62.7, 81.1, 69.0, 87.9, 66.4),
    _piip("ConvNeXt-L", (1024, 336), 12, "7B", 1037, 67.0, 31.4, 67.1, 68.3, 63.9, 81.5, 69.4, 88.2, 67.1),
    _plus("ConvNeXt-L", (1024, 336), 12, "7B", 1037, 74.5, 44.7, 73.0, 95.0, 62.9, 82.3, 72.1, 87.5, 74.0),
    _llava("13B", 191, 67.7, 36.1, 61.3, 71.6, 63.3, 80.0, 68.2, 85.9, 66.8),
    _piip("CLIP-B", (512, 448), 12, "13B", 422, 67.6, 36.1, 61.6, 71.0, 64.5, 81.2, 69.5, 87.2, 67.3),
    _deeper("ConvNeXt-B", (1024, 336), 24, "13B", 598, 68.5, 37.7, 64.2, 71.1, 64.2, 81.8, 69.3, 87.9, 68.0),
    _deeper("ConvNeXt-L", (1024, 336), 24, "13B", 1037, 66.5, 36.8, 69.2, 69.8, 65.2, 82.5, 70.5, 87.6, 68.5),
)


def _setting(name: str, title: str, large: int, interactions: int, *numbers: float, **options: Any) -> MultimodalEntry:
    entry = _piip("CLIP-B", (large, 256), interactions, "7B", *numbers, **options)
    return dataclasses.replace(entry, name=name, title=title, table="XIII")


_ADOPTED = "the paper does not say whether the second stage goes on from them; here it does"
# What each is called, image size of CLIP-B, interactions, and numbers as above
SETTINGS = (
    _setting(
        "chat_interactions_2",
        "2 interactions, first stage: projector",
        *(512, 2, 193, 65.0, 34.0, 57.9, 68.8, 62.8, 79.1, 67.3, 86.5, 65.2),
        note="Table XI prints other scores of this model: MMBench 63.8, MM-Vet 32.0, average 64.8",
    ),
    _setting(
        "chat_interactions_0",
        "no interactions, first stage: projector",
        *(528, 0, 196, 65.7, 29.5, 56.8, 69.2, 63.0, 78.9, 66.8, 85.4, 64.4),
    ),
    _setting(
        "chat_interactions_12",
        "12 interactions, first stage: projector",
        *(464, 12, 194, 64.6, 31.3, 57.4, 69.5, 62.7, 79.1, 67.1, 86.1, 64.7),
    ),
    _setting(
        "chat_first_stage_interactions",
        "2 interactions, first stage: projector, interactions",
        *(512, 2, 193, 63.2, 25.4, 52.4, 70.6, 61.1, 75.9, 62.7, 85.5, 62.1),
        first_stage=("projector", "interactions"),
        note=f"Interactions of the first stage: {_ADOPTED}",
    ),
    _setting(
        "chat_first_stage_all",
        "2 interactions, first stage: projector, vision tower",
        *(512, 2, 193, 34.3, 15.1, 43.3, 67.7, 44.6, 52.3, 41.0, 71.9, 46.3),
        first_stage=("projector", "vision_tower"),
        note=f"Vision tower of the first stage: {_ADOPTED}",
    ),
)
"""Settings of the paper's ablation of PIIP-LLaVA, Table XIII."""
