"""Cases of DINO from the backbone's maps: detections, and whole training steps."""

from __future__ import annotations

from typing import Any

import torch

from checkers import Check, GoldenCase
from piip.modeling.dino import DINO
from piip.modeling.dino.denoising import DenoisingQueries
from piip.modeling.dino.detector import Predictions, to_original
from piip.modeling.dino.transformer import TransformerOutput

from .dino_losses import check_denoising, check_matches
from .dino_model import (
    build_dino,
    check_gradients,
    check_selected,
    given_draws,
    given_images,
    given_maps,
    given_targets,
    record_outputs,
)


@torch.no_grad()
def verify_dino_test(case: GoldenCase) -> Check:
    """Detections, and what leads to them."""
    check, model, maps, images = Check(case), build_dino(case), given_maps(case), given_images(case)
    outputs = record_outputs([model.neck, model.transformer.encoder, model.transformer])
    predictions = model.predict(maps, images)
    necks, memory, out = outputs[0], outputs[1], outputs[2]
    for level, output in enumerate(necks):
        check.close(f"inter.neck.{level}", output)
    check.close("inter.memory", memory)
    _check_predictions(check, predictions, out, selected="topk_score", anchors="topk_anchor")
    for image, found in enumerate(model.detect(maps, images)):
        check.close(f"output.boxes_resized_image.{image}", found.pred_boxes.tensor)
        check.equal(f"output.query_index.{image}", found.query)
        factors = case.tensors["input.scale_factor"][image].tolist()
        height, width = (round(found.image_size[axis] / factors[1 - axis]) for axis in (0, 1))
        found = to_original(found, {"height": height, "width": width})
        check.close(f"output.boxes.{image}", found.pred_boxes.tensor)
        check.close(f"output.scores.{image}", found.scores)
        check.equal(f"output.labels.{image}", found.pred_classes)
    return check


def verify_dino_denoising(case: GoldenCase) -> Check:
    """The denoising queries of given draws, or a training step with them, whichever the case records."""
    check, model, targets, draws = Check(case), build_dino(case), given_targets(case), given_draws(case)
    with torch.no_grad():
        queries = model.denoising(targets, model.label_embed, draws)
    if "output.total" in case.results:
        _check_step(check, model, queries, targets)
    else:
        check_denoising(check, queries, draws, model.denoising, targets)
    return check


def _check_step(check: Check, model: DINO, queries: DenoisingQueries, targets: list[Any]) -> None:
    case, images = check.case, given_images(check.case)
    maps = [x.requires_grad_() for x in given_maps(case)]
    check.close("inter.dn_label_query", queries.content)
    check.close("inter.dn_bbox_query", queries.box_logits)
    check.equal("inter.attn_mask", queries.layout.attention_mask(case.config["Q"]))
    outputs = record_outputs([model.transformer])
    with torch.no_grad():
        predictions = model.predict(maps, images, queries)
    _check_predictions(check, predictions, outputs[0], selected="enc_topk_scores", anchors="enc_topk_anchors")
    check_matches(check, "inter", model.criterion, predictions, targets, queries.layout.size)

    losses = model.train().losses(maps, images, targets, given_draws(case))
    for name, loss in losses.items():
        check.close(f"output.{name}", loss)
    total = sum(losses.values())
    check.close("output.total", total)
    total.backward()
    check_gradients(check, model, maps)


def _check_predictions(
    check: Check, predictions: Predictions, out: TransformerOutput, *, selected: str, anchors: str
) -> None:
    check.close("inter.all_cls_scores", predictions.class_logits)
    check.close("inter.all_bbox_preds", predictions.boxes)
    check.close(f"inter.{selected}", predictions.encoder_logits)
    check.close(f"inter.{anchors}", predictions.encoder_boxes)
    # not recorded where equal scores leave the order open
    if "inter.topk_index" in check.case.results:
        check_selected(check, "inter.topk_index", out.selection.class_logits, out.selection.cells)
