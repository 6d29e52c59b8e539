"""UperNet's heads against first principles; golden cases have their numbers."""

import pytest

pytest.importorskip("detectron2")

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch import nn

from piip.modeling import FCNHead, PIIPBackbone, UperNetHead, feature_shapes
from piip_core.meta import on_meta
from piip_digits.model import demo_config

WIDTHS = (6, 8, 10, 12)
SHAPES = {f"res{i + 2}": ShapeSpec(channels=width, stride=4 * 2**i) for i, width in enumerate(WIDTHS)}
CLASSES = 5


def head(**options):
    return UperNetHead(SHAPES, **{"num_classes": CLASSES, "channels": 8, "norm": "BN", **options})


def auxiliary(**options):
    return FCNHead({"res4": SHAPES["res4"]}, **{"num_classes": CLASSES, "channels": 6, "norm": "BN", **options})


def maps(batch=2, height=64, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, shape.channels, height // shape.stride, width // shape.stride, generator=generator)
        for name, shape in SHAPES.items()
    }


def randomise(module):
    """Weights and running statistics that nothing can cancel out."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 + 0.1)
    return module.eval()


def test_published_tensor_sizes():
    """As listed for the released models, of which every tensor has a place."""
    shapes = {name: ShapeSpec(channels=3200, stride=spec.stride) for name, spec in SHAPES.items()}
    with on_meta():
        decoder = UperNetHead(shapes, num_classes=150, channels=1536)
        aux = FCNHead({"res4": shapes["res4"]}, num_classes=150, channels=1536)
    sizes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert sizes["psp_modules.0.weight"] == (1536, 3200, 1, 1)
    assert sizes["bottleneck.weight"] == (1536, 9344, 3, 3)
    assert sizes["fpn_bottleneck.weight"] == (1536, 6144, 3, 3)
    assert sizes["fpn_convs.2.norm.running_var"] == (1536,)
    assert len(sizes) == 2 + 6 * 12 and len(aux.state_dict()) == 2 + 6
    assert tuple(aux.state_dict()["convs.0.weight"].shape) == (1536, 3200, 3, 3)
    assert not any(name.endswith("bias") and "norm" not in name and "conv_seg" not in name for name in sizes)


def test_loss_is_divided_by_all_pixels_or_by_the_valid_ones():
    decoder = randomise(head())
    logits = decoder.layers(maps())
    labels = torch.randint(CLASSES, (2, 64, 96), generator=torch.Generator().manual_seed(2))
    labels[:, :20] = 255
    full = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
    usual = F.cross_entropy(full, labels, ignore_index=255)  # over valid pixels
    share = (labels != 255).double().mean()
    (published,) = decoder.losses(logits, labels).values()
    torch.testing.assert_close(published, usual * share.float())
    (valid,) = randomise(head(loss_average="valid", loss_weight=0.4)).losses(logits, labels).values()
    torch.testing.assert_close(valid, 0.4 * usual)


def test_nothing_but_ignored_pixels_is_no_loss():
    for average in ("all", "valid"):
        decoder = head(loss_average=average)
        logits = decoder.layers(maps())
        loss = decoder.losses(logits, torch.full((2, 64, 96), 255))["loss_sem_seg"]
        assert loss.item() == 0.0
        loss.backward()
        assert all(not p.grad.any() for p in decoder.parameters())


def test_accuracy_counts_valid_pixels():
    decoder = randomise(head())
    logits = decoder.layers(maps())
    labels = F.interpolate(logits, size=(64, 96), mode="bilinear").argmax(dim=1)
    labels[:, :16] = (labels[:, :16] + 1) % CLASSES  # a quarter is wrong
    labels[:, 16:40] = 255
    with EventStorage() as storage:
        decoder.losses(logits, labels, name="aux")
        assert storage.latest()["aux/accuracy"][0] == pytest.approx(100 * 24 / 40)


def test_autocast_does_not_reach_the_heads():
    decoder, features = randomise(head()), maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = decoder.layers({name: x.bfloat16().float() for name, x in features.items()})
        assert nn.Conv2d(6, 6, 1)(features["res2"]).dtype == torch.bfloat16  # it is on
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, decoder.layers({name: x.bfloat16().float() for name, x in features.items()}))
    # a backbone's half precision is taken as it comes
    assert decoder.layers({name: x.bfloat16() for name, x in features.items()}).dtype == torch.float32


def test_shapes_for_a_config_are_those_of_the_backbone():
    config = demo_config()
    built = PIIPBackbone(config, pad_divisor=32, pretrained=False).output_shape()
    assert feature_shapes(config, ["res2", "res3", "res4"]) == built
    assert feature_shapes(config, ["res4"]) == {"res4": built["res4"]}


def test_one_image_and_batch_norm_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="one training image per process"):
        head().layers(maps(batch=1))
    assert head().eval().layers(maps(batch=1)).shape == (1, CLASSES, 16, 24)
    assert head(norm="GN", channels=64).layers(maps(batch=1)).shape == (1, CLASSES, 16, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: head(num_classes=1), "two classes or more"),
        (lambda: head(ignore_value=2), "ignore_value=2"),
        (lambda: head(loss_average="some"), "'all' or 'valid'"),
        (lambda: UperNetHead({"res4": SHAPES["res4"]}, num_classes=3, channels=8), "two maps or more"),
        (lambda: FCNHead(SHAPES, num_classes=3, channels=8), "expected one map"),
    ],
)
def test_settings_that_make_no_head_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
