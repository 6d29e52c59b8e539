"""What `tools/benchmark.py` takes from Detectron2: the backbones that PIIP is measured against, and the neck."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling.backbone import vit
from torch import nn

from piip.modeling import PIIPFPN, PIIPBackbone
from piip_core import zoo

from .breakdown import REST
from .sides import Side

__all__ = ["VITDET", "VITDET_PARTS", "piip_with_neck", "vitdet_backbone", "vitdet_side"]

VITDET_PARTS: Mapping[type[nn.Module], str] = {
    vit.Attention: "self-attention",
    vit.SimpleFeaturePyramid: "feature pyramid",
    vit.ViT: REST,
}
"""Names of its parts for `piip_tools.backbone_benchmark.measure_parts`."""

# Width, depth, heads, and the blocks with global attention, of Detectron2's projects/ViTDet
VITDET = {"vitdet_b": (768, 12, 12, (2, 5, 8, 11)), "vitdet_l": (1024, 24, 16, (5, 11, 17, 23))}


def vitdet_backbone(name: str, image_size: int = 1024) -> nn.Module:
    """Detectron2's ViTDet with its SimpleFeaturePyramid (256 channels), with random weights.

    Args:
        name: Out of `VITDET`.
        image_size: Side of the square images, a multiple of 32. The pyramid takes images of no other size.
    """
    width, depth, heads, global_blocks = VITDET[name]
    backbone = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model.backbone
    backbone.square_pad = backbone.net.img_size = image_size
    backbone.net.embed_dim, backbone.net.depth, backbone.net.num_heads = width, depth, heads
    backbone.net.window_block_indexes = [block for block in range(depth) if block not in global_blocks]
    backbone.net.drop_path_rate = 0.0
    return instantiate(backbone)


def vitdet_side(name: str, scale: float = 1.0) -> Side:
    """ViTDet for images of 1024 pixels times `scale`, as a side of a benchmark."""
    size = int(1024 * scale) // 32 * 32
    return Side(name=name, build=lambda: vitdet_backbone(name, size), image_size=size)


def piip_with_neck(entry: zoo.ZooEntry) -> nn.Module:
    """A PIIP backbone with the FPN (256 channels) of our detectors, with random weights."""
    backbone = PIIPBackbone(entry.config, pad_divisor=32, pretrained=False)
    return PIIPFPN(backbone, list(backbone.output_shape()), 256)
