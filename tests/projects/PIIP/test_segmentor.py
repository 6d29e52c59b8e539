"""The segmentor: windows, inference, training batch and what it refuses."""

import pytest

pytest.importorskip("detectron2")

import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from piip.modeling import FCNHead, SlidingWindowSegmentor, UperNetHead
from piip.modeling.segmentor import SegmentationHead, window_starts
from piip_core.meta import on_meta

CLASSES = 4


class Pixelwise(Backbone):
    """One 1x1 convolution per map: what a pixel gives does not depend on its neighbours.

    Args:
        strides (tuple[int, ...]): of the maps.
        divisor (int): images are padded to multiples of it.
    """

    def __init__(self, strides=(1,), divisor=0):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 6, stride, stride=stride) for stride in strides)
        self.divisor, self.seen = divisor, []

    def forward(self, x):
        self.seen.append(x.detach())
        return {f"res{i + 2}": conv(x) for i, conv in enumerate(self.convs)}

    def output_shape(self):
        return {f"res{i + 2}": ShapeSpec(channels=6, stride=c.stride[0]) for i, c in enumerate(self.convs)}

    @property
    def size_divisibility(self):
        return self.divisor


class PixelHead(SegmentationHead):
    """Classifies the finest map as it is."""

    def fuse(self, maps):
        return maps[0]


def pixel_model(strides=(1,), divisor=0, **options):
    torch.manual_seed(0)
    backbone = Pixelwise(strides, divisor)
    head = PixelHead({"res2": backbone.output_shape()["res2"]}, num_classes=CLASSES, channels=6)
    nn.init.normal_(head.conv_seg.weight)
    return segmentor(backbone, head, **options).eval()


def upernet_model(divisor=0, **options):
    torch.manual_seed(0)
    backbone = Pixelwise((4, 8, 16, 32), divisor)
    shapes, common = backbone.output_shape(), {"num_classes": CLASSES, "channels": 8, "norm": "BN", "dropout": 0.0}
    return segmentor(
        backbone,
        UperNetHead(shapes, **common),
        auxiliary_head=FCNHead({"res4": shapes["res4"]}, loss_weight=0.4, **common),
        **options,
    )


def segmentor(backbone, head, **options):
    options = {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [60.0, 50.0, 40.0], **options}
    return SlidingWindowSegmentor(backbone=backbone, sem_seg_head=head, **options)


def picture(height, width, seed=0):
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("window", "stride"), [(64, 43), (64, 64), (32, 1), (5, 3), (512, 341)])
def test_windows_cover_every_pixel_and_stay_inside(window, stride):
    for length in [1, 4, 5, 6, 63, 64, 65, 107, 150, 512, 853, 854, 2213]:
        starts = window_starts(length, window, stride)
        spans = [(start, min(start + window, length)) for start in starts]
        assert set().union(*(range(*span) for span in spans)) == set(range(length))
        assert all(end - start == min(window, length) for start, end in spans)
        assert starts == sorted(set(starts)) and starts[-1] == max(length - window, 0)
        assert all(start == k * stride for k, start in enumerate(starts[:-1]))
        if len(starts) > 1:  # one fewer would leave pixels out
            assert (len(starts) - 2) * stride + window < length


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 70), (16, 90), (33, 24)])
def test_windows_make_no_difference_where_pixels_are_independent(size):
    whole, slide = (pixel_model(inference=kind, window=24, stride=17) for kind in ("whole", "slide"))
    entry = {"image": picture(*size), "height": 50, "width": 60}
    (expected,), (found,) = whole([entry]), slide([entry])
    assert found["sem_seg"].shape == (CLASSES, 50, 60)
    torch.testing.assert_close(found["sem_seg"], expected["sem_seg"], rtol=1e-5, atol=1e-5)
    assert len(slide.backbone.seen) > 1


@torch.no_grad()
def test_windows_and_images_together_give_what_they_give_alone():
    one, many = (
        upernet_model(window=32, stride=20).eval(),
        upernet_model(window=32, stride=20, window_batch_size=5).eval(),
    )
    entries = [{"image": picture(60, 70, seed)} for seed in range(3)]
    alone = [one([entry])[0]["sem_seg"] for entry in entries]
    for entry, expected in zip(many(entries), alone, strict=True):
        torch.testing.assert_close(entry["sem_seg"], expected, rtol=1e-5, atol=1e-6)
    sizes = [len(x) for x in many.backbone.seen]
    assert sizes == [15, 12]  # 3 x 3 windows of three images, five at a time


@torch.no_grad()
@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_a_larger_neighbour_changes_nothing(inference):
    model = upernet_model(divisor=32, inference=inference, window=64, stride=40).eval()
    small, large = {"image": picture(40, 50)}, {"image": picture(90, 130)}
    together = model([small, large])
    assert torch.equal(together[0]["sem_seg"], model([small])[0]["sem_seg"])
    assert torch.equal(together[1]["sem_seg"], model([large])[0]["sem_seg"])


@torch.no_grad()
def test_padding_for_the_divisor_is_the_mean_colour_and_cut_off():
    model = pixel_model(divisor=32, inference="whole")
    (output,) = model([{"image": picture(40, 70)}])
    (seen,) = model.backbone.seen
    assert seen.shape == (1, 3, 64, 96)
    assert not seen[..., 40:, :].any() and not seen[..., 70:].any()
    plain = pixel_model(inference="whole")
    torch.testing.assert_close(output["sem_seg"], plain([{"image": picture(40, 70)}])[0]["sem_seg"])


def test_training_pads_images_with_the_mean_colour_and_labels_with_ignore():
    model = upernet_model(divisor=32, train_size=128)
    entries = [
        {"image": picture(60, 128), "sem_seg": torch.zeros(60, 128, dtype=torch.long)},
        {"image": picture(64, 40, 1), "sem_seg": torch.ones(64, 40, dtype=torch.long)},
    ]
    losses = model(entries)
    (seen,) = model.backbone.seen
    assert seen.shape == (2, 3, 128, 128)
    assert not seen[0, :, 60:].any() and not seen[1, :, :, 40:].any()
    torch.testing.assert_close(seen[1, :, :64, :40] * model.pixel_std + model.pixel_mean, entries[1]["image"].float())

    labels = torch.full((2, 128, 128), 255)
    labels[0, :60], labels[1, :64, :40] = 0, 1
    for part, name, weight in ((model.sem_seg_head, "sem_seg", 1.0), (model.auxiliary_head, "sem_seg_aux", 0.4)):
        logits = F.interpolate(part.layers(model.backbone(seen)), size=(128, 128), mode="bilinear")
        loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()
        torch.testing.assert_close(losses[f"loss_{name}"], weight * loss)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_images_beyond_the_training_size_are_padded_to_the_largest():
    model = upernet_model(divisor=32, train_size=64)
    model([{"image": picture(h, w), "sem_seg": torch.zeros(h, w, dtype=torch.long)} for h, w in ((50, 100), (40, 30))])
    assert model.backbone.seen[0].shape == (2, 3, 64, 128)


def test_training_without_matching_labels_is_refused():
    model = upernet_model()
    with pytest.raises(ValueError, match=r"a\.jpg: expected a label map .* found none"):
        model([{"image": picture(64, 64), "file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=r"\(64, 96\) \(h, w\) like the image, found of \(64, 95\)"):
        model([{"image": picture(64, 96), "sem_seg": torch.zeros(64, 95, dtype=torch.long)}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference": "window"}, "'slide' or 'whole'"),
        ({"window": 32, "stride": 33}, "pixels between are left out"),
        ({"window": (32, 64), "stride": (32, 65)}, "pixels between are left out"),
        ({"window": 0}, "window=0: expected a positive"),
        ({"stride": (1, 2, 3)}, "a height and a width"),
        ({"window_batch_size": 0}, "window_batch_size=0"),
    ],
)
def test_settings_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pixel_model(**options)


def test_the_shared_config_follows_its_backbone(repo_root, tmp_path):
    """The heads' widths come from the backbone's configuration, also when that is overridden and after saving."""
    cfg = LazyConfig.load(str(repo_root / "projects/PIIP/configs/common/upernet.py"))
    for key, value in (("data", {"num_classes": 150}), ("train", {"load_pretrained": False})):
        cfg[key] = value
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    for one in (cfg, LazyConfig.load(str(tmp_path / "config.yaml"))):
        with on_meta():
            head, auxiliary = instantiate(one.model.sem_seg_head), instantiate(one.model.auxiliary_head)
        assert head.bottleneck.in_channels == 3200 + 4 * 1536
        assert auxiliary.convs[0].weight.shape == (1536, 3200, 3, 3)
        assert head.conv_seg.out_channels == auxiliary.conv_seg.out_channels == 150
        assert (head.loss_weight, auxiliary.loss_weight) == (1.0, 0.4)
        assert isinstance(head.bottleneck.norm, nn.SyncBatchNorm)
    # The meta device, where FLOPs are counted, has no autocast to turn off
    maps = {f"res{i + 2}": torch.zeros(1, 3200, 128 >> i, 128 >> i, device="meta") for i in range(4)}
    assert head.eval().layers(maps).shape == (1, 150, 128, 128)


def test_config_of_the_demo_trains_and_predicts(repo_root):
    cfg = LazyConfig.load(str(repo_root / "projects/PIIP/configs/demo/piip_digits_upernet.py"))
    cfg.data.num_classes = 11
    model = instantiate(cfg.model)
    side, classes = cfg.data.train.crop[0], cfg.data.num_classes
    assert (model.window, model.train_size) == ((side, side), side)
    assert window_starts(cfg.data.test.short_side, side, model.stride[0]) == [0, 64]  # windows that overlap
    labels = torch.randint(classes, (side, side), generator=torch.Generator().manual_seed(0))
    losses = model([{"image": picture(side, side, seed), "sem_seg": labels} for seed in range(2)])
    sum(losses.values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    model.eval()
    with torch.no_grad():
        (output,) = model([{"image": picture(192, 192)}])
    assert output["sem_seg"].shape == (classes, 192, 192)
