import copy

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.structures import ImageList

from piip.modeling import PIIPFPN, PIIPBackbone
from piip_core import BranchConfig, InteractionConfig, PIIPConfig, ViTConfig, prepare_for_inference
from piip_tools.flops.executed import executed_count


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


NAMES = ["res2", "res3", "res4", "res5"]


@pytest.mark.parametrize("top", [None, LastLevelMaxPool, "res3"])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_neck_is_detectron2s(norm, fuse_type, top, randomize):
    block = LastLevelP6P7(32, 64, in_feature=top) if isinstance(top, str) else top and top()
    backbone = PIIPBackbone(tiny_config(), pad_divisor=64)
    neck = randomize(PIIPFPN(backbone, NAMES, 64, norm=norm, fuse_type=fuse_type, top_block=block)).double().eval()
    peer = FPN(copy.deepcopy(backbone), NAMES, 64, norm=norm, fuse_type=fuse_type, top_block=copy.deepcopy(block))
    peer = peer.double().eval()
    peer.load_state_dict(neck.state_dict())
    image = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    maps, expected = neck(image), peer(image)
    assert list(maps) == list(expected) == list(neck.output_shape())
    for name, tensor in expected.items():
        torch.testing.assert_close(maps[name], tensor)
    for found in (maps, expected):
        sum((tensor * (i + 1)).square().sum() for i, tensor in enumerate(found.values())).backward()
    for (name, ours), theirs in zip(neck.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("top", [None, LastLevelMaxPool, "res2"])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_neck_of_a_prepared_model_computes_the_same(norm, top, randomize):
    block = LastLevelP6P7(32, 64, in_feature=top) if isinstance(top, str) else top and top()
    neck = PIIPFPN(PIIPBackbone(tiny_config(), pad_divisor=64), NAMES, 64, norm=norm, top_block=block)
    neck = randomize(neck).eval()
    image = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        expected = neck(image)
        for _ in range(2):
            for name, tensor in prepare_for_inference(neck)(image).items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    joined = [] if norm else ["res3"] if top == "res2" else ["res2", "res3"]
    assert [name for name, shape in neck.bottom_up.output_shape().items() if shape.channels == 64] == joined


def test_counted_is_what_is_computed():
    """Once prepared, the executed FLOPs are those of the joined layers: a fourth of the cells, and the neck's width."""
    neck = PIIPFPN(PIIPBackbone(tiny_config(), pad_divisor=64), NAMES, 8)
    last = "bottom_up.features.feature_pyramid.levels.4.3"
    macs = executed_count(neck, torch.zeros(1, 3, 128, 128)).macs
    assert (macs[last], macs["fpn_lateral2"]) == (16 * 16 * 32 * 4 * 32, 32 * 32 * 32 * 8)
    macs = executed_count(prepare_for_inference(neck), torch.zeros(1, 3, 128, 128)).macs
    assert macs[last] == 16 * 16 * 32 * 4 * 8
    assert (macs["fpn_lateral2"], macs["fpn_lateral4"]) == (0, 8 * 8 * 32 * 8)
