"""Cases of DINO's losses, matching and denoising queries."""

from __future__ import annotations

import torch
from torch import Tensor

from checkers import Check, GoldenCase
from piip.modeling.dino import ContrastiveDenoising, DINOCriterion, HungarianMatcher
from piip.modeling.dino.denoising import DenoisingDraws, DenoisingLayout, DenoisingQueries
from piip.modeling.dino.detector import Predictions
from piip.modeling.dino.geometry import Target
from piip_core.errors import NotSupportedYet

from .dino_model import given_targets

# Predictions by their names in the cases
_PREDICTIONS = ("all_cls_scores", "all_bbox_preds", "enc_topk_scores", "enc_topk_anchors")


def verify_dino_loss(case: GoldenCase) -> Check:
    """Losses, gradients and matches of given predictions."""
    check, targets, criterion = Check(case), given_targets(case), DINOCriterion(HungarianMatcher())
    inputs = [case.tensors[f"input.{name}"].clone().requires_grad_() for name in _PREDICTIONS]
    predictions, layout = Predictions(*inputs), _layout(case, targets)
    losses = criterion(*inputs, targets, layout)
    for name, loss in losses.items():
        check.close(f"output.{name}", loss)
    total = sum(losses.values())
    check.close("output.total", total)
    total.backward()
    for name, given in zip(_PREDICTIONS, inputs, strict=True):
        check.close(f"grad.{name}", given.grad)
    check_matches(check, "output", criterion, predictions, targets, layout.size if layout else 0)
    return check


def _layout(case: GoldenCase, targets: list[Target]) -> DenoisingLayout | None:
    meta = case.info["dn_meta"]
    if meta is None:
        return None
    counts = [len(target.labels) for target in targets]
    layout = DenoisingLayout.of(counts, meta["num_dn_group"] * max(counts))
    if (layout.size, layout.num_groups) != (meta["pad_size"], meta["num_dn_group"]):
        raise NotSupportedYet(f"denoising groups {meta} for images with {counts} boxes")
    return layout


@torch.no_grad()
def check_matches(
    check: Check, kind: str, criterion: DINOCriterion, predictions: Predictions, targets: list[Target], slots: int
) -> None:
    """Costs, where recorded, and matches of the encoder's selection and of every layer, for images with boxes."""
    layers = {"interm": (predictions.encoder_logits, predictions.encoder_boxes)}
    for k, (logits, boxes) in enumerate(zip(predictions.class_logits, predictions.boxes, strict=True)):
        layers[f"layer{k}"] = (logits[:, slots:], boxes[:, slots:])
    for layer, (logits, boxes) in layers.items():
        (matches,) = criterion.matcher(logits[None], boxes[None], targets)
        for image, target in enumerate(targets):
            if not len(target.labels):
                continue
            if f"{kind}.cost.{layer}.{image}" in check.case.results:
                cost = criterion.matcher.cost(logits[image], boxes[image], target)
                check.close(f"{kind}.cost.{layer}.{image}", cost)
            for name, index in zip(("query", "gt"), matches[image], strict=True):
                check.equal(f"{kind}.match_{name}.{layer}.{image}", index)


def check_denoising(
    check: Check,
    queries: DenoisingQueries,
    draws: DenoisingDraws,
    denoising: ContrastiveDenoising,
    targets: list[Target],
) -> None:
    """Everything that the generator makes."""
    info, layout = check.case.info, queries.layout
    layout_numbers = torch.tensor([layout.size, layout.num_groups, layout.half])
    expected = torch.tensor([info["pad_size"], info["num_dn_group"], info["single_pad"]])
    check.equal("pad_size, num_dn_group, single_pad", layout_numbers, expected)
    check.close("output.dn_label_query", queries.content)
    check.close("output.dn_bbox_query", queries.box_logits)
    check.equal("output.attn_mask", layout.attention_mask(check.case.config["Q"]))
    check.equal("output.known_labels", torch.cat([target.labels for target in targets])[layout.box])
    check.equal("output.noised_labels", queries.labels)
    check.close("output.noised_boxes", queries.boxes)
    check.equal("output.known_image", layout.image)
    check.equal("output.slot", layout.slot)
    check.equal("output.positive_index", _indices(layout.positive))
    check.equal("output.negative_index", _indices(~layout.positive))
    check.equal("output.flip_index", _indices(denoising.relabelled(draws.label)))


def _indices(flags: Tensor) -> Tensor:
    return flags.nonzero().flatten()
