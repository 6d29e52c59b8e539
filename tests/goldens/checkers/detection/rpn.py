"""Cases of the feature pyramid network and the region proposal network."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from checkers import Check, GoldenCase
from piip.modeling.rcnn import CASCADE_STDS, PublishedRPN, TwoSidedBox2BoxTransform, weights_from_stds
from piip_core.errors import NotSupportedYet

from .model import build_detector, image_list

# An IoU that no two boxes exceed: the NMS removes nothing
_KEEP_ALL = 2.0


@torch.no_grad()
def verify_fpn_rpn(case: GoldenCase) -> Check:
    """Pyramid, head, anchors, proposals, assignment, losses per level, and decoding of extreme deltas."""
    check = Check(case)
    model = build_detector(case, "rpn")
    rpn: PublishedRPN = model.proposal_generator
    images = image_list(case)
    features = model.backbone(images.tensor)
    for index, name in enumerate(rpn.in_features):
        check.close(f"output.fpn.{index}", features[name])
    maps = [features[name] for name in rpn.in_features]
    objectness, deltas = rpn.rpn_head(maps)
    anchors = rpn.anchor_generator(maps)
    base_anchors = list(rpn.anchor_generator.cell_anchors)
    for index, (score, delta, boxes) in enumerate(zip(objectness, deltas, anchors, strict=True)):
        check.close(f"output.objectness.{index}", score)
        check.close(f"output.deltas.{index}", delta)
        check.close(f"output.anchors.{index}", _recorded_rows(check, f"output.anchors.{index}", boxes.tensor))
        check.close(f"output.base_anchors.{index}", base_anchors[index])
    logits = [score.permute(0, 2, 3, 1).flatten(1) for score in objectness]
    deltas = [delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for delta in deltas]
    _check_selection(check, rpn, anchors, logits, deltas, images.image_sizes)
    proposals, _ = rpn(images, features)
    for image, found in enumerate(proposals):
        check.close(f"output.proposals.{image}", _with_scores(found))
    _check_training(check, rpn, anchors, logits, deltas)
    if "input.decode.rois" in case.tensors:
        _check_decoding(check)
    return check


def _recorded_rows(check: Check, name: str, boxes: Tensor) -> Tensor:
    """Anchors of large levels are recorded in part: as many rows from the start as from the end."""
    half = len(check.case.tensors[name]) // 2
    return boxes if len(boxes) <= 2 * half + 1 else torch.cat((boxes[:half], boxes[-half:]))


def _noted_numbers(check: Check, note: str, pattern: str) -> list[int]:
    """Numbers that a case gives in its notes alone."""
    text = check.case.info["notes"][note]
    found = re.search(pattern, text)
    if found is None:
        raise NotSupportedYet(f"note on {note}: {text!r}")
    return list(map(int, found.groups()))


def _with_scores(proposals: Instances) -> Tensor:
    """(n, 5): box and probability."""
    return torch.cat((proposals.proposal_boxes.tensor, proposals.objectness_logits.sigmoid()[:, None]), dim=1)


def _check_selection(
    check: Check,
    rpn: PublishedRPN,
    anchors: list[Boxes],
    logits: list[Tensor],
    deltas: list[Tensor],
    image_sizes: Sequence[tuple[int, int]],
) -> None:
    """What goes into the NMS, level by level."""
    decoded = [_decoded(rpn, boxes.tensor, delta) for boxes, delta in zip(anchors, deltas, strict=True)]
    for image, size in enumerate(image_sizes):
        rows = [
            _selected(rpn, boxes[image], scores[image], size) for boxes, scores in zip(decoded, logits, strict=True)
        ]
        levels = [torch.full((len(found),), level) for level, found in enumerate(rows)]
        check.close(f"output.pre_nms_boxes.{image}", torch.cat(rows)[:, :4])
        check.close(f"output.pre_nms_scores.{image}", torch.cat(rows)[:, 4])
        check.equal(f"output.pre_nms_level.{image}", torch.cat(levels))


def _decoded(rpn: PublishedRPN, anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (images, n, 4) of anchors (n, 4) and deltas (images, n, 4)."""
    return torch.stack([rpn.box2box_transform.apply_deltas(delta, anchors) for delta in deltas])


def _selected(rpn: PublishedRPN, boxes: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 5) boxes and probabilities that one level of an image gives to the NMS.

    The cases record levels of at most as many anchors as the top-k in the order of the anchors, not of the scores.
    """
    topk = rpn.pre_nms_topk[False]
    unsorted = len(logits) <= topk
    rank = -torch.arange(len(logits), dtype=logits.dtype) if unsorted else logits
    (kept,) = find_top_rpn_proposals(
        [boxes[None]], [rank[None]], [size], _KEEP_ALL, topk, topk, rpn.min_box_size, False
    )
    if unsorted:
        kept.objectness_logits = logits[-kept.objectness_logits.long()]
    return _with_scores(kept)


def _check_training(
    check: Check, rpn: PublishedRPN, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor]
) -> None:
    metas = check.case.info["img_metas"]
    targets = []
    for image, meta in enumerate(metas):
        instances = Instances(tuple(meta["img_shape"][:2]))
        instances.gt_boxes = Boxes(check.case.tensors[f"input.gt_boxes.{image}"])
        targets.append(instances)
    padded = [tuple(meta["pad_shape"][:2]) for meta in metas]
    variants = {"": padded}
    if "output.smallpad.loss_rpn_cls" in check.case.results:
        (less,) = _noted_numbers(check, "smallpad", r"pad_shape (\d+) smaller")
        variants["smallpad."] = [*padded[:-1], tuple(side - less for side in padded[-1])]
    with EventStorage():
        for prefix, sizes in variants.items():
            labels, matched = rpn.label_and_sample_anchors(anchors, targets, sizes)
            losses = _losses_per_level(rpn, anchors, logits, deltas, labels, matched)
            check.close(f"output.{prefix}loss_rpn_cls", losses["loss_rpn_cls"])
            check.close(f"output.{prefix}loss_rpn_bbox", losses["loss_rpn_loc"])
            if not prefix:
                _check_assignment(check, rpn, Boxes.cat(anchors), targets, sizes, labels, matched)


def _check_assignment(
    check: Check,
    rpn: PublishedRPN,
    anchors: Boxes,
    targets: list[Instances],
    sizes: list[tuple[int, int]],
    labels: list[Tensor],
    matched: list[Tensor],
) -> None:
    for image, (instances, size) in enumerate(zip(targets, sizes, strict=True)):
        same = (matched[image][:, None] == instances.gt_boxes.tensor).all(dim=2)
        index = same.int().argmax(dim=1)
        assigned = torch.where(labels[image] > 0, index + 1, labels[image].long())
        assigned[~rpn.considered_anchors(anchors, instances.image_size, size)] = -2
        check.equal(f"output.assigned.{image}", assigned)


def _losses_per_level(
    rpn: PublishedRPN,
    anchors: list[Boxes],
    logits: list[Tensor],
    deltas: list[Tensor],
    labels: list[Tensor],
    matched: list[Tensor],
) -> dict[str, Tensor]:
    """The losses of each level alone, over the samples of all levels as in the sum."""
    total = sum((label >= 0).sum() for label in labels)
    ends = torch.tensor([len(boxes) for boxes in anchors]).cumsum(0).tolist()
    found: dict[str, list[Tensor]] = {}
    for level, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = [label[start:end] for label in labels]
        boxes = [box[start:end] for box in matched]
        losses = rpn.losses([anchors[level]], [logits[level]], part, [deltas[level]], boxes)
        share = sum((label >= 0).sum() for label in part) / total
        for name, loss in losses.items():
            found.setdefault(name, []).append(loss * share)
    return {name: torch.stack(values) for name, values in found.items()}


def _check_decoding(check: Check) -> None:
    """Deltas beyond the clamp, with the codings of the RPN, the box head and the third cascade stage."""
    config, tensors = check.case.config, check.case.tensors
    heads = config["roi_head"]["bbox_head"]
    stages = heads if isinstance(heads, list) else [heads]
    third = stages[2]["bbox_coder"]["target_stds"] if len(stages) > 2 else CASCADE_STDS[2]
    codings = {
        "rpn": config["rpn_head"]["bbox_coder"]["target_stds"],
        "rcnn": stages[0]["bbox_coder"]["target_stds"],
        "stage3": third,
    }
    size = tuple(_noted_numbers(check, "decode", r"height (\d+), width (\d+)"))
    boxes, deltas = tensors["input.decode.rois"], tensors["input.decode.deltas"]
    for name, stds in codings.items():
        decoded = TwoSidedBox2BoxTransform(weights_from_stds(stds)).apply_deltas(deltas, boxes)
        check.close(f"output.decode.{name}_free", decoded)
        clipped = Boxes(decoded.reshape(-1, 4).clone())
        clipped.clip(size)
        check.close(f"output.decode.{name}_clipped", clipped.tensor.reshape(decoded.shape))
