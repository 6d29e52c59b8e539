"""Chat models that nobody published: today's encoders in the paper's design, for any Qwen3 as the language model.

Both branches of each end with 24 x 24 tokens of a square image of 768 pixels; other images keep their aspect ratio.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from ..branches import TimmConfig
from ..config import BranchConfig, InteractionConfig, PIIPConfig
from .entry import MultimodalEntry, MultimodalScores

_LARGE, _SMALL = 768, 384  # pixels of the large and the small image
_INTERACTIONS = 4
# Of ConvNeXt-B: before each interaction a part of the third stage, before the last one the fourth
_CONVNEXT_SEGMENTS = ((0, 16), (17, 25), (26, 34), (35, 38))


def _branch(name: str, tag: str, image_size: int, **options: Any) -> BranchConfig:
    return BranchConfig(
        network=TimmConfig(name=name), image_size=image_size, pretrained=f"timm:{name}.{tag}", **options
    )


def _entry(name: str, title: str, *branches: BranchConfig, merge: int = 1, **options: Any) -> MultimodalEntry:
    return MultimodalEntry(
        name=f"{name}_{_LARGE}_{_SMALL}",
        title=title,
        vision=PIIPConfig(
            branches=branches, interaction=InteractionConfig(num_interactions=_INTERACTIONS), merging=None
        ),
        language_model="Qwen/Qwen3-1.7B",
        embed_dim=2048,
        projector_norm="layer",
        max_pixels=_LARGE**2,
        options={"projector_merge": merge, "projector_newline": True},
        chat_template="qwen3",
        training_data="",
        scores=MultimodalScores(*[math.nan] * 9),
        flops_g=math.nan,
        **options,
    )


@cache
def models() -> tuple[MultimodalEntry, ...]:
    """All of them; made when asked for, since timm has to say what its networks look like.

    Where encoders were trained with other means of pixels than each other, images have ImageNet's, as published.
    """
    so400m = _branch("vit_so400m_patch16_siglip_gap_384", "v2_webli", _SMALL)
    dinov3 = _branch("vit_large_patch16_dinov3", "lvd1689m", _SMALL)
    siglip_b = _branch("vit_base_patch16_siglip_gap_512", "v2_webli", _LARGE)
    convnext = _branch("convnext_base", "dinov3_lvd1689m", _LARGE, segments=_CONVNEXT_SEGMENTS)
    halves = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    return (
        _entry("chat_siglip2_so400m_b", "SigLIP 2 So400m and B", so400m, siglip_b, merge=2, images=halves),
        _entry("chat_dinov3_l_siglip2_b", "DINOv3-L and SigLIP 2 B", dinov3, siglip_b, merge=2),
        _entry("chat_siglip2_so400m_convnext_dinov3_b", "SigLIP 2 So400m and ConvNeXt-B (DINOv3)", so400m, convnext),
    )
