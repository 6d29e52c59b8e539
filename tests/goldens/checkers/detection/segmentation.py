"""Cases of UperNet: heads on given maps with their losses, and inference of a whole segmentor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from checkers import Check, GoldenCase
from piip.modeling.segmentor import FCNHead, SegmentationHead, SlidingWindowSegmentor, UperNetHead, window_starts

from .model import MapsBackbone, recorded_maps, rename_heads, require


@torch.no_grad()
def verify_segmentation_head(case: GoldenCase) -> Check:
    """Logits of both heads on given maps, features on the way, and the losses of a label map."""
    check = Check(case)
    maps = recorded_maps(case)
    model = _build_segmentor(case, MapsBackbone([x.shape[1] for x in maps]))
    model.backbone.maps = maps
    features, head = model.backbone(maps[0]), model.sem_seg_head
    check.close("output.psp", head.pool(maps[-1]))
    fused = head.fuse(maps)
    rows, columns = case.tensors["output.features"].shape[-2:]
    check.close("output.features", fused[..., :rows, :columns])
    labels = case.tensors["input.label"][:, 0].long()
    check.same("pixels", labels.numel(), case.info["counts"]["pixels"])
    check.same("ignored pixels", int((labels == head.ignore_value).sum()), case.info["counts"]["ignored"])
    for name, part in (("decode", head), ("aux", model.auxiliary_head)):
        logits = part.layers(features)
        check.close(f"output.{name}_logits", logits)
        with EventStorage() as storage:
            (loss,) = part.losses(logits, labels, name=name).values()
            accuracy = storage.latest()[f"{name}/accuracy"][0]
        check.close(f"output.{name}.loss_ce", loss.reshape(1))
        check.close(f"output.{name}.acc_seg", torch.tensor([accuracy]))
    return check


@torch.no_grad()
def verify_segmentation_inference(case: GoldenCase) -> Check:
    """Windows, their logits, the average and the result at the size of the original image; the whole image too."""
    check = Check(case)
    kernels = [case.tensors[f"state.backbone.{name}.weight"].shape[-1] for name in ("stem", "down.0")]
    model = _build_segmentor(case, ToyEncoder(case.config["backbone"], *kernels))
    image, (meta,) = case.below("input.")["image"], case.info["img_metas"]
    inside, original = tuple(meta["img_shape"][:2]), tuple(meta["ori_shape"][:2])
    logits = {"whole": model.whole_logits(image)}
    if "output.slide_logits" in case.results:
        _check_windows(check, model, image)
        logits["slide"] = model.slide_logits(image)
        check.close("output.slide_logits", logits["slide"])
    results = {mode: model.to_original(found[0], inside, original) for mode, found in logits.items()}
    for mode, result in results.items():
        check.close(f"output.{mode}_rescaled", result[None])
    check.equal("output.pred", results[model.inference].argmax(dim=0))
    if inside == tuple(image.shape[-2:]):  # the model itself takes images without padding
        (output,) = model([{"image": image[0], "height": original[0], "width": original[1]}])
        check.close(f"output.{model.inference}_rescaled", output["sem_seg"][None])
    return check


def _check_windows(check: Check, model: SlidingWindowSegmentor, image: Tensor) -> None:
    (height, width), (tall, wide), (down, right) = image.shape[-2:], model.window, model.stride
    windows = [
        [y, min(y + tall, height), x, min(x + wide, width)]
        for y in window_starts(height, tall, down)
        for x in window_starts(width, wide, right)
    ]
    check.same("windows_y1y2x1x2", windows, check.case.info["windows_y1y2x1x2"])
    count = torch.zeros(height, width)
    for top, bottom, left, end in windows:
        count[top:bottom, left:end] += 1
    check.equal("output.count", count)
    check.close("output.crop0_logits", model.whole_logits(image[..., :tall, :wide]))


class ToyEncoder(Backbone):
    """The encoder of the inference cases: a patch convolution and some that reduce further, each behind a tanh.

    Args:
        settings (Mapping[str, Any]): the public configuration's.
        patch (int): side of the patches.
        step (int): stride of the others.
    """

    size_divisibility = 0  # the cases have sizes that no stride divides

    def __init__(self, settings: Mapping[str, Any], patch: int = 4, step: int = 2) -> None:
        super().__init__()
        require("backbone.type", settings["type"], "ToyEncoder")
        first, *others = settings["channels"]
        self.stem = nn.Conv2d(3, first, patch, stride=patch)
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, step, stride=step) for before, after in zip([first, *others], others, strict=False)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [self.stem(x).tanh()]
        for conv in self.down:
            maps.append(conv(maps[-1]).tanh())
        return dict(zip(self.output_shape(), maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes, stride = {}, 1
        for i, conv in enumerate([self.stem, *self.down]):
            stride *= conv.stride[0]
            shapes[f"res{i + 2}"] = ShapeSpec(channels=conv.out_channels, stride=stride)
        return shapes


def _build_segmentor(case: GoldenCase, backbone: Backbone) -> SlidingWindowSegmentor:
    """The project's segmentor with the settings and weights of the case, in evaluation mode."""
    config, test = case.config, case.config["test_cfg"]
    require("test_cfg.mode", test["mode"] in ("slide", "whole"), True)
    model = SlidingWindowSegmentor(
        backbone=backbone,
        sem_seg_head=_build_head(backbone, config["decode_head"]),
        auxiliary_head=_build_head(backbone, config["auxiliary_head"]),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        inference=test["mode"],
        **{ours: test[public] for ours, public in (("window", "crop_size"), ("stride", "stride")) if public in test},
    ).eval()
    state = case.below("state.")
    inside = {name: state.pop(name) for name in list(state) if name.startswith("backbone.")}
    model.load_state_dict(inside | rename_heads(state, "upernet"))
    return model


def _build_head(backbone: Backbone, public: Mapping[str, Any]) -> SegmentationHead:
    loss, norm = public["loss_decode"], public["norm_cfg"]
    require("loss_decode.type", loss["type"], "CrossEntropyLoss")
    require("loss_decode.use_sigmoid", loss["use_sigmoid"], False)
    shapes = list(backbone.output_shape().items())
    indices = public["in_index"] if isinstance(public["in_index"], list) else [public["in_index"]]
    options = {
        "num_classes": public["num_classes"],
        "channels": public["channels"],
        "norm": norm["type"],
        "dropout": public["dropout_ratio"],
        "align_corners": public["align_corners"],
        "loss_weight": loss["loss_weight"],
    }
    maps = {name: shape for index, (name, shape) in enumerate(shapes) if index in indices}
    if public["type"] == "UPerHead":
        return UperNetHead(maps, pool_scales=public["pool_scales"], **options)
    require("head.type", public["type"], "FCNHead")
    require("auxiliary_head.concat_input", public["concat_input"], False)
    require("auxiliary_head.num_convs", public["num_convs"], 1)
    return FCNHead(maps, **options)
