import copy

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList

from piip.modeling import PIIPFPN, PIIPBackbone, prepare_for_inference
from piip_core import BranchConfig, InteractionConfig, PIIPConfig, ViTConfig


def tiny_config():
    networks = [ViTConfig(embed_dim=d, depth=2, num_heads=2, pos_grid=4) for d in (32, 16)]
    branches = tuple(BranchConfig(network=n, image_size=s) for n, s in zip(networks, (64, 128), strict=True))
    return PIIPConfig(branches=branches, interaction=InteractionConfig(num_interactions=2, num_heads=4))


def test_output_shape_is_what_forward_gives():
    backbone = PIIPBackbone(tiny_config(), pad_divisor=64)
    features = backbone(torch.randn(1, 3, 128, 192))
    shapes = backbone.output_shape()
    assert list(features) == list(shapes) == ["res2", "res3", "res4", "res5"]
    for name, feature in features.items():
        stride = shapes[name].stride
        assert feature.shape == (1, shapes[name].channels, 128 // stride, 192 // stride)


def test_padding_rule_reaches_the_detector():
    backbone = PIIPFPN(
        PIIPBackbone(tiny_config(), pad_divisor=224), ["res2", "res3", "res4", "res5"], 8, top_block=LastLevelMaxPool()
    )
    images = ImageList.from_tensors(
        [torch.zeros(3, 200, 300)], backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    )
    assert images.tensor.shape == (1, 3, 224, 448) and images.image_sizes == [(200, 300)]


def test_padding_must_fit_the_strides():
    with pytest.raises(ValueError, match="pad_divisor=48"):
        PIIPBackbone(tiny_config(), pad_divisor=48)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["", "GN"])
def test_prepared_neck_computes_the_same(norm, randomize):
    """Laterals with a norm stay."""
    names = ["res2", "res3", "res4", "res5"]
    backbone = PIIPBackbone(tiny_config(), pad_divisor=64)
    fpn = randomize(PIIPFPN(backbone, names, 64, norm=norm, top_block=LastLevelMaxPool())).eval()
    prepared = prepare_for_inference(prepare_for_inference(copy.deepcopy(fpn)))  # twice is once
    image = torch.randn(1, 3, 128, 192)
    for name, expected in fpn(image).items():
        torch.testing.assert_close(prepared(image)[name], expected, rtol=1e-4, atol=1e-4)
    features, shapes = prepared.bottom_up(image), prepared.bottom_up.output_shape()
    assert [features[name].shape[1] for name in names] == [shapes[name].channels for name in names]
    assert [shapes[name].channels for name in names] == ([64, 64, 32, 32] if norm == "" else [32] * 4)
