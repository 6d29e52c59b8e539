"""The project's DINO behind the maps of a golden case."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from piip.modeling.dino import DINO, ContrastiveDenoising, DINOCriterion, DINOTransformer, HungarianMatcher
from piip.modeling.dino.denoising import DenoisingDraws
from piip.modeling.dino.targets import Target, make_target
from piip_core.checkpoints.head_names import HEADS
from piip_core.checkpoints.rules import RuleTable
from piip_core.verification import Check, GoldenCase

from .model import MapsBackbone

__all__ = [
    "build_dino",
    "check_gradients",
    "check_selected",
    "given_draws",
    "given_images",
    "given_maps",
    "given_targets",
    "record_outputs",
]

_NAMES = RuleTable(HEADS["dino"].rules)
_LEVELS = 3  # maps of the backbone


def build_dino(case: GoldenCase) -> DINO:
    """DINO with the sizes and weights of the case, in evaluation mode. What the case has no weights for is NaN."""
    config = case.config
    model = DINO(
        backbone=MapsBackbone([config["cin"]] * _LEVELS),
        transformer=DINOTransformer(
            embed_dim=config["E"],
            num_heads=config["heads"],
            num_points=config["points"],
            ffn_dim=config["ffn"],
            num_encoder_layers=config["nenc"],
            num_decoder_layers=config["ndec"],
            num_levels=_LEVELS + 1,
            num_queries=config["Q"],
        ),
        criterion=DINOCriterion(HungarianMatcher()),
        denoising=ContrastiveDenoising(config["num_dn"], config["label_noise"], config["box_noise"]),
        num_classes=config["C"],
        num_groups=config["groups"],
        max_detections=config["max_per_img"],
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state = {_our_name(name): tensor for name, tensor in case.below("state.").items()}
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{case.name}: the model has no {unexpected}")
    return model


def _our_name(published: str) -> str:
    found = _NAMES.to_ours(published)
    if found is None:
        raise ValueError(f"no rule for the published name {published}")
    return found[0]


def check_gradients(check: Check, model: DINO, maps: list[Tensor]) -> None:
    """Gradients of every parameter that has one, and of the backbone's maps."""
    gradients = {_NAMES.to_published(name)[0]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"feat.{i}": x.grad for i, x in enumerate(maps)}
    for name, gradient in gradients.items():
        check.close(f"grad.{name}", gradient)


def check_selected(check: Check, name: str, scores: Tensor, index: Tensor) -> None:
    """Selected cells, as far as scores (B, Q, classes) differ: the order among equal scores is not defined."""
    best = scores.amax(dim=-1)
    tied = (best[:, :, None] == best[:, None, :]).sum(dim=-1) > 1
    check.equal(name, torch.where(tied, check.case.tensors[name], index))


def given_images(case: GoldenCase) -> ImageList:
    """The images of the case, as far as heads look at them: their sizes."""
    sizes = [tuple(size) for size in case.tensors["input.img_shapes"].tolist()]
    # losses and denoising alone see no padded batch
    padded = case.tensors.get("input.batch_input_shape", case.tensors["input.img_shapes"].amax(dim=0))
    return ImageList(torch.zeros(len(sizes), 3, *padded.tolist()), sizes)


def given_maps(case: GoldenCase) -> list[Tensor]:
    """Maps of the backbone, or of the neck."""
    maps = case.below("input.feat.")
    return [maps[str(index)] for index in range(len(maps))]


def given_targets(case: GoldenCase) -> list[Target]:
    targets = []
    for image, size in enumerate(given_images(case).image_sizes):
        instances = Instances(size)
        instances.gt_boxes = Boxes(case.tensors[f"input.gt_boxes.{image}"])
        instances.gt_classes = case.tensors[f"input.gt_labels.{image}"]
        targets.append(make_target(instances, case.config["C"], torch.device("cpu"), torch.float32))
    return targets


def given_draws(case: GoldenCase) -> DenoisingDraws:
    draws = case.below("draw.")
    return DenoisingDraws(draws["label_p"], draws["new_label"], draws["box_sign01"], draws["box_part"])


def record_outputs(modules: Iterable[nn.Module]) -> list[Any]:
    """A list that fills with the outputs of the modules as they run."""
    outputs: list[Any] = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs
