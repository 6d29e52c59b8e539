"""The project's DINO behind the maps of a golden case."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from checkers import Check, GoldenCase
from checkers.losses import check_gradients as check_recorded
from piip.modeling.dino import DINO, ContrastiveDenoising, DINOCriterion, DINOTransformer, HungarianMatcher
from piip.modeling.dino.denoising import DenoisingDraws
from piip.modeling.dino.geometry import Target, make_target
from piip_core.checkpoints.head_names import HEADS
from piip_core.checkpoints.rules import RuleTable, rename_parts

from .model import MapsBackbone

_NAMES = RuleTable(rename_parts(*HEADS["dino"].published.items()))
_DEFAULT_LEVELS = 4  # of the published transformer


def build_dino(case: GoldenCase) -> DINO:
    """DINO with the sizes and weights of the case, in evaluation mode. What the case has no weights for is NaN."""
    config, levels = case.config, _num_levels(case)
    backbone = MapsBackbone([config["cin"]] * (levels - 1))  # the neck adds a level
    model = DINO(
        backbone=backbone,
        transformer=DINOTransformer(
            embed_dim=config["E"],
            num_heads=config["heads"],
            num_points=config["points"],
            ffn_dim=config["ffn"],
            num_encoder_layers=config["nenc"],
            num_decoder_layers=config["ndec"],
            num_levels=levels,
            num_queries=config["Q"],
        ),
        criterion=DINOCriterion(HungarianMatcher()),
        denoising=ContrastiveDenoising(config["num_dn"], config["label_noise"], config["box_noise"]),
        num_classes=config["C"],
        in_features=list(backbone.output_shape()),
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


def _num_levels(case: GoldenCase) -> int:
    """Levels of the transformer, as far as the case tells: by its embeddings, its maps, or the convolutions before."""
    state, maps = case.below("state."), case.below("input.feat.")
    if "input.spatial_shapes" in case.tensors:
        return len(case.tensors["input.spatial_shapes"])
    if "bbox_head.transformer.level_embeds" in state:
        return len(state["bbox_head.transformer.level_embeds"])
    return len(maps) + 1 if maps else _DEFAULT_LEVELS


def _our_name(published: str) -> str:
    found = _NAMES.to_ours(published)
    if found is None:
        raise ValueError(f"no rule for the published name {published}")
    return found[0]


def check_gradients(check: Check, model: DINO, maps: list[Tensor]) -> None:
    """Gradients of the parameters and of the backbone's maps, and which parameters have none."""
    gradients = {_NAMES.to_published(name)[0][0]: p.grad for name, p in model.named_parameters()}
    check_recorded(check, gradients | {f"feat.{i}": x.grad for i, x in enumerate(maps)})
    if "parameters_without_gradient" in check.case.info:
        without = sorted(name for name, gradient in gradients.items() if gradient is None)
        check.same("without gradient", without, sorted(check.case.info["parameters_without_gradient"]))


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
