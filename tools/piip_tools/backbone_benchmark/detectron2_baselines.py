"""What the benchmark takes from Detectron2: the backbones that PIIP is measured against, and the neck."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling.backbone import vit
from torch import nn

from piip.modeling import PIIPFPN, PIIPBackbone
from piip_core import zoo

from .breakdown import REST
from .models import TimedModel

__all__ = ["VITDET_PARTS", "build_piip_with_neck", "vitdet"]

VITDET_PARTS: Mapping[type[nn.Module], str] = {
    vit.Attention: "self-attention",
    vit.SimpleFeaturePyramid: "feature pyramid",
    vit.ViT: REST,
}
"""Names of its parts for `measure_parts`."""

# Width, depth, heads, and the blocks with global attention, of Detectron2's projects/ViTDet
_VITDET = {"vitdet_b": (768, 12, 12, (2, 5, 8, 11)), "vitdet_l": (1024, 24, 16, (5, 11, 17, 23))}


def vitdet(name: str, scale: float = 1.0) -> TimedModel:
    """Detectron2's "vitdet_b" or "vitdet_l" with its SimpleFeaturePyramid (256 channels), for 1024 * `scale` pixels."""
    width, depth, heads, global_blocks = _VITDET[name]
    backbone = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model.backbone
    size = backbone.square_pad = backbone.net.img_size = int(1024 * scale) // 32 * 32
    backbone.net.embed_dim, backbone.net.depth, backbone.net.num_heads = width, depth, heads
    backbone.net.window_block_indexes = [block for block in range(depth) if block not in global_blocks]
    backbone.net.drop_path_rate = 0.0
    return TimedModel(name=name, build=lambda: instantiate(backbone), image_size=size)


def build_piip_with_neck(entry: zoo.ZooEntry) -> nn.Module:
    """A PIIP backbone with the FPN (256 channels) of our detectors, with random weights."""
    backbone = PIIPBackbone(entry.config, pad_divisor=32, pretrained=False)
    return PIIPFPN(backbone, list(backbone.output_shape()), 256)
