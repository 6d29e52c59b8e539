"""A small DINO for the tests of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from piip.modeling.dino import DINO, ContrastiveDenoising, DINOCriterion, DINOTransformer, HungarianMatcher

NUM_CLASSES = 5


class ConvBackbone(Backbone):
    """Three strided convolutions: maps of strides 8, 16 and 32."""

    size_divisibility = 32
    padding_constraints = {"size_divisibility": 32}  # noqa: RUF012 (Detectron2's contract has a plain attribute)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, stage in zip(("res3", "res4", "res5"), self.stages, strict=True):
            x = stage(x)
            maps[name] = x
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{k}": ShapeSpec(channels=8, stride=2**k) for k in (3, 4, 5)}


@pytest.fixture
def make_dino() -> Callable[..., DINO]:
    """Builds a small DINO whose weights are all different, so that every part has a say."""

    def make(num_queries: int = 12, use_act_checkpoint: bool = False, **changes: Any) -> DINO:
        torch.manual_seed(0)
        model = DINO(
            backbone=ConvBackbone(),
            transformer=DINOTransformer(
                embed_dim=16,
                num_heads=2,
                num_points=2,
                ffn_dim=24,
                num_encoder_layers=2,
                num_decoder_layers=2,
                num_queries=num_queries,
                use_act_checkpoint=use_act_checkpoint,
            ),
            criterion=DINOCriterion(HungarianMatcher()),
            denoising=ContrastiveDenoising(num_denoising=6),
            **{
                "num_classes": NUM_CLASSES,
                "num_groups": 4,
                "pixel_mean": [127.5] * 3,
                "pixel_std": [127.5] * 3,
                **changes,
            },
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture
def batch() -> list[dict[str, Any]]:
    """Two images of different sizes; the second has no object."""
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [60.0, 20.0, 100.0, 70.0], [5.0, 5.0, 20.0, 30.0]])
    full = Instances((96, 128), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 4, 2]))
    empty = Instances((64, 96), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
    return [
        {"image": torch.randint(256, (3, *x.image_size), generator=generator, dtype=torch.uint8), "instances": x}
        for x in (full, empty)
    ]
