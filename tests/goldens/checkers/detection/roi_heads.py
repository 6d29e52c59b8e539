"""Cases of a whole Mask R-CNN behind given feature maps."""

from __future__ import annotations

import re

import numpy as np
import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from checkers import Check, GoldenCase

from .model import build_detector, image_list


@torch.no_grad()
def verify_mask_rcnn(case: GoldenCase) -> Check:
    """Detections from maps, heads on given proposals, and training losses."""
    check = Check(case)
    model = build_detector(case, "mask_rcnn")
    images = image_list(case)
    features = model.backbone(images.tensor)
    check_detections(check, model, images, features)
    _check_given_proposals(check, model, images, features)
    _check_losses(check, model, images, features)
    return check


def check_detections(check: Check, model: nn.Module, images: ImageList, features: dict[str, Tensor]) -> None:
    proposals, _ = model.proposal_generator(images, features)
    for image, found in enumerate(proposals):
        rows = torch.cat((found.proposal_boxes.tensor, found.objectness_logits.sigmoid()[:, None]), dim=1)
        name = f"output.e2e.proposals.{image}"
        check.close(name, rows[: len(check.case.tensors[name])])
    inputs = [
        {"image": torch.zeros(3, *size), "height": meta["ori_shape"][0], "width": meta["ori_shape"][1]}
        for size, meta in zip(images.image_sizes, check.case.info["img_metas"], strict=True)
    ]
    for image, output in enumerate(model(inputs)):
        check_instances(check, "e2e", image, output["instances"])


def check_instances(check: Check, kind: str, image: int, found: Instances) -> None:
    prefix = f"output.{kind}"
    check.close(f"{prefix}.boxes.{image}", found.pred_boxes.tensor)
    check.close(f"{prefix}.scores.{image}", found.scores)
    check.equal(f"{prefix}.labels.{image}", found.pred_classes)
    _check_bits(check, f"{prefix}.masks_packed.{image}", found.pred_masks)
    # areas follow from the bits: as many pixels may differ as bits may
    areas, allowed = found.pred_masks.flatten(1).sum(dim=1), _mask_bits(check) * found.pred_masks.numel()
    check.counts(f"{prefix}.mask_area.{image}", areas, allowed=allowed)


def _mask_bits(check: Check) -> float:
    """Share of mask bits that may differ, as the case says: of probabilities of 0.5, rounding decides."""
    found = re.search(r"allow ([\d.]+) percent of bits", check.case.info["notes"].get("masks", ""))
    return float(found[1]) / 100 if found else 0.0


def _check_bits(check: Check, name: str, ours: Tensor) -> None:
    """Compares a boolean tensor with the packed bits of the case."""
    packed = check.case.tensors[name].cpu().numpy()
    padding = (-ours.numel()) % 8
    reference = torch.from_numpy(np.unpackbits(packed)).bool()
    check.equal(name, torch.cat((ours.flatten(), ours.new_zeros(padding))), reference, allowed=_mask_bits(check))


def given_proposals(check: Check, name: str, images: ImageList) -> list[Instances]:
    found = []
    for image, size in enumerate(images.image_sizes):
        instances = Instances(size)
        instances.proposal_boxes = Boxes(check.case.tensors[f"input.{name}.{image}"])
        instances.objectness_logits = torch.zeros(len(instances.proposal_boxes))
        found.append(instances)
    return found


def _check_given_proposals(check: Check, model: nn.Module, images: ImageList, features: dict[str, Tensor]) -> None:
    heads, tensors = model.roi_heads, check.case.tensors
    proposals = given_proposals(check, "proposals", images)
    boxes = [x.proposal_boxes for x in proposals]
    pooler = heads.box_pooler
    levels = assign_boxes_to_levels(
        boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )
    check.equal("output.given.levels", levels)
    pooled = pooler([features[name] for name in heads.box_in_features], boxes)
    check.close("output.given.roi_feats", pooled[: len(tensors["output.given.roi_feats"])])
    predictions = heads.box_predictor(heads.box_head(pooled))
    check.close("output.given.cls_logits", predictions[0])
    check.close("output.given.deltas", predictions[1])
    crops = heads.mask_pooler([features[name] for name in heads.mask_in_features], boxes)
    logits = heads.mask_head.layers(crops[: len(tensors["output.given.mask_logits"])])
    check.close("output.given.mask_logits", logits)
    decoded = heads.box_predictor.predict_boxes(predictions, proposals)
    probabilities = heads.box_predictor.predict_probs(predictions, proposals)
    for image, (rows, size) in enumerate(zip(decoded, images.image_sizes, strict=True)):
        clipped = Boxes(rows.reshape(-1, 4).clone())
        clipped.clip(size)
        check.close(f"output.given.decoded_boxes.{image}", clipped.tensor.reshape(rows.shape))
        check.close(f"output.given.probs.{image}", probabilities[image])
    detections, _ = heads(images, features, proposals)
    for image, (found, meta) in enumerate(zip(detections, check.case.info["img_metas"], strict=True)):
        check_instances(check, "given", image, detector_postprocess(found, *meta["ori_shape"][:2]))


def _check_losses(check: Check, model: nn.Module, images: ImageList, features: dict[str, Tensor]) -> None:
    """Losses on all given proposals, and what they were computed against."""
    heads = model.roi_heads
    proposals, targets = given_proposals(check, "train_proposals", images), ground_truth(check, images)
    for image, (given, target) in enumerate(zip(proposals, targets, strict=True)):
        matches, labels = heads.proposal_matcher(pairwise_iou(target.gt_boxes, given.proposal_boxes))
        check.equal(f"output.assigned.{image}", torch.where(labels > 0, matches + 1, labels.long()))
    heads.train()
    with EventStorage() as storage:
        sampled, losses = heads(images, features, proposals, targets)
        accuracy = storage.latest()["fast_rcnn/cls_accuracy"][0]
    heads.eval()
    for public, ours in (("cls", "cls"), ("bbox", "box_reg"), ("mask", "mask")):
        check.close(f"output.loss_{public}", losses[f"loss_{ours}"].reshape(1))
    check.close("output.acc", torch.tensor([100.0 * accuracy]))
    _check_mask_targets(check, sampled, heads.num_classes)


def _check_mask_targets(check: Check, sampled: list[Instances], num_classes: int) -> None:
    """Positive boxes and their mask targets, brought into one order: samples are drawn in random order."""
    positive = [x[x.gt_classes < num_classes] for x in sampled]
    boxes = [
        torch.cat((torch.full((len(x), 1), float(image)), x.proposal_boxes.tensor), dim=1)
        for image, x in enumerate(positive)
    ]
    size = check.case.config["train_cfg"]["rcnn"]["mask_size"]
    masks = torch.cat([x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, size) for x in positive])
    rows, reference = torch.cat(boxes), check.case.tensors["output.pos_rois"]
    packed = check.case.tensors["output.mask_targets_packed"].cpu().numpy()
    count = reference.shape[0] * size * size
    targets = torch.from_numpy(np.unpackbits(packed, count=count)).bool().reshape(-1, size, size)
    ours, theirs = _lexicographic(rows), _lexicographic(reference)
    check.close("output.pos_rois", rows[ours], reference[theirs], "in the order of the coordinates")
    check.equal("output.mask_targets_packed", masks[ours], targets[theirs], allowed=_mask_bits(check))


def _lexicographic(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.lexsort(rows.cpu().numpy().T[::-1]))


def ground_truth(check: Check, images: ImageList) -> list[Instances]:
    found = []
    for image, size in enumerate(images.image_sizes):
        instances = Instances(size)
        instances.gt_boxes = Boxes(check.case.tensors[f"input.gt_boxes.{image}"])
        instances.gt_classes = check.case.tensors[f"input.gt_labels.{image}"]
        packed = check.case.tensors[f"input.gt_masks_packed.{image}"].cpu().numpy()
        shape = (len(instances.gt_boxes), *size)
        bits = np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape)
        instances.gt_masks = BitMasks(torch.from_numpy(bits).bool())
        found.append(instances)
    return found
