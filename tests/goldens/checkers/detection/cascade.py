"""Cases of a whole Cascade Mask R-CNN behind given feature maps."""

from __future__ import annotations

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from checkers import Check, GoldenCase

from .model import build_detector, image_list
from .roi_heads import check_detections, check_instances, given_proposals, ground_truth


@torch.no_grad()
def verify_cascade_mask_rcnn(case: GoldenCase) -> Check:
    """Detections from maps, every stage on given proposals, and the training losses of every stage."""
    check = Check(case)
    model = build_detector(case, "cascade_mask_rcnn")
    images = image_list(case)
    features = model.backbone(images.tensor)
    check_detections(check, model, images, features)
    _check_stages(check, model.roi_heads, images, features)
    _check_losses(check, model.roi_heads, images, features)
    return check


def _check_stages(check: Check, heads: nn.Module, images: ImageList, features: dict[str, Tensor]) -> None:
    proposals = given_proposals(check, "proposals", images)
    stages = heads.run_stages(features, proposals)
    for stage, (before, predictions) in enumerate(stages):
        prefix = f"output.stage{stage}"
        check.close(f"{prefix}.rois", _with_image_index(before))
        check.close(f"{prefix}.cls_logits", predictions[0])
        check.close(f"{prefix}.deltas", predictions[1])
        check.close(f"{prefix}.refined", _with_image_index(heads.refine(predictions, before, stage)))
        crops = heads.mask_pooler(
            [features[name] for name in heads.mask_in_features], [x.proposal_boxes for x in proposals]
        )
        reference = check.case.tensors[f"{prefix}.mask_logits"]
        check.close(f"{prefix}.mask_logits", heads.mask_head[stage].layers(crops[: len(reference)]))
    logits = torch.stack([predictions[0] for _, predictions in stages]).mean(dim=0)
    check.close("output.given.probs", logits.softmax(dim=-1))
    detections, _ = heads(images, features, proposals)
    for image, (found, meta) in enumerate(zip(detections, check.case.info["img_metas"], strict=True)):
        check_instances(check, "given", image, detector_postprocess(found, *meta["ori_shape"][:2]))


def _check_losses(check: Check, heads: nn.Module, images: ImageList, features: dict[str, Tensor]) -> None:
    """Losses on all given proposals; the recorded ones have the weights of their stages."""
    proposals, targets = given_proposals(check, "train_proposals", images), ground_truth(check, images)
    heads.train()
    with EventStorage() as storage:
        _, losses = heads(images, features, proposals, targets)
        latest = storage.latest()
    heads.eval()
    for stage in range(heads.num_cascade_stages):
        for public, ours in (("cls", "cls"), ("bbox", "box_reg"), ("mask", "mask")):
            check.close(f"output.loss.s{stage}.loss_{public}", losses[f"loss_{ours}_stage{stage}"].reshape(1))
        accuracy = latest[f"stage{stage}/fast_rcnn/cls_accuracy"][0]
        check.close(f"output.loss.s{stage}.acc", torch.tensor([100.0 * accuracy]))


def _with_image_index(found: list[Instances]) -> Tensor:
    """Boxes as (image index, x1, y1, x2, y2)."""
    return torch.cat(
        [
            torch.cat((torch.full((len(x), 1), float(image)), x.proposal_boxes.tensor), dim=1)
            for image, x in enumerate(found)
        ]
    )
