"""Matching and losses of DINO: of the encoder's selection, of every decoder layer, and of the denoising part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from .denoising import DenoisingLayout
from .geometry import Target

# Queries that learn a box, and the rows of the concatenated ground truth that they learn: image, query, row
Pairs = tuple[Tensor, Tensor, Tensor]

_EPS = 1e-12  # of the logarithms in the cost
_ALPHA, _GAMMA = 0.25, 2.0  # balance and exponent of the focal cost and loss


@dataclass(frozen=True)
class HungarianMatcher:
    """Finds the assignment of least total cost: focal cost of the class, L1 distance, and generalised IoU in pixels.

    Args:
        class_weight: factor of the focal cost.
        box_weight: factor of the L1 distance of (cx, cy, w, h), relative to the image.
        giou_weight: factor of the generalised IoU.
    """

    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0

    def cost(self, class_logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Costs (..., Q, N) of all pairs of predictions and ground truth of one image.

        Predictions are class logits (..., Q, num_classes) and boxes (..., Q, 4) as (cx, cy, w, h).
        """
        score = class_logits.sigmoid()[..., target.labels]
        positive = _ALPHA * (1 - score) ** _GAMMA * -(score + _EPS).log()
        negative = (1 - _ALPHA) * score**_GAMMA * -(1 - score + _EPS).log()
        distance = torch.cdist(boxes, target.boxes.expand(*boxes.shape[:-2], -1, -1), p=1)
        pixels = box_convert(boxes, "cxcywh", "xyxy") * target.scale
        pairs = torch.broadcast_tensors(pixels[..., None, :], target.pixel_boxes)
        giou = 1 - generalized_box_iou_loss(*pairs)
        return self.class_weight * (positive - negative) + self.box_weight * distance - self.giou_weight * giou

    @torch.no_grad()
    def __call__(
        self, class_logits: Tensor, boxes: Tensor, targets: Sequence[Target]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Matches every layer for itself: (layers, B, Q, num_classes) and (layers, B, Q, 4) with B images.

        Returns:
            For every layer and image, indices of the matched queries and of their boxes, min(Q, N) each, on the CPU.

        Raises:
            FloatingPointError: If predictions are not finite.
        """
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in class_logits]
        for image, target in enumerate(targets):
            costs = self.cost(class_logits[:, image], boxes[:, image], target).cpu()
            if not costs.isfinite().all():
                raise FloatingPointError(
                    "DINO's predictions are not finite, so they cannot be matched: training diverged. Lower the "
                    "learning rate, or clip gradients (train.clip_norm)"
                )
            for layer, cost in zip(found, costs, strict=True):
                queries, rows = linear_sum_assignment(cost.numpy())
                layer.append((torch.from_numpy(queries), torch.from_numpy(rows)))
        return found


@dataclass(frozen=True)
class DINOCriterion:
    """Focal loss over all queries, L1 and generalised-IoU losses over those with a box; weights are inside.

    All are sums over the batch, divided by the number of pairs of query and box: its mean over processes, at least 1.

    Args:
        matcher: assigns ground truth to queries.
        class_weight: factor of the focal loss.
        box_weight: factor of the L1 loss, of (cx, cy, w, h) relative to the image.
        giou_weight: factor of the generalised-IoU loss, which is taken in pixels.
    """

    matcher: HungarianMatcher
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0

    def __call__(
        self,
        class_logits: Tensor,
        boxes: Tensor,
        encoder_logits: Tensor,
        encoder_boxes: Tensor,
        targets: Sequence[Target],
        denoising: DenoisingLayout | None = None,
    ) -> dict[str, Tensor]:
        """All losses of `Predictions`, with what the denoising slots hold, if there are any.

        Returns:
            "interm_loss_*" of the encoder, "d{K}.loss_*" of decoder layer K and "loss_*" of the last, where * is cls,
            bbox or iou; and the same of the decoder layers as "dn_loss_*" for the denoising part.

        Raises:
            FloatingPointError: If predictions are not finite.
        """
        slots = denoising.size if denoising else 0
        # the encoder's selection is matched and judged like one more layer
        logits = torch.cat((encoder_logits[None], class_logits[:, :, slots:]))
        predicted = torch.cat((encoder_boxes[None], boxes[:, :, slots:]))
        matches = self.matcher(logits, predicted, targets)
        pairs = [_join(layer, targets, logits.device) for layer in matches]
        known: Pairs | None = None
        if denoising:  # positive slots, and the boxes that they were made from
            known = tuple(x[denoising.positive] for x in (denoising.image, denoising.slot, denoising.box))
        count, known_count = _averaged([len(pairs[0][0]), len(known[0]) if known else 0], logits)

        losses: dict[str, Tensor] = {}
        prefixes = ["interm_", *(f"d{k}." for k in range(len(class_logits) - 1)), ""]
        for layer, prefix in enumerate(prefixes):
            found = self.layer_losses(logits[layer], predicted[layer], pairs[layer], targets, count)
            losses |= {f"{prefix}loss_{name}": loss for name, loss in found.items()}
        if known:
            for layer, prefix in enumerate(prefixes[1:]):
                rows = class_logits[layer, :, :slots], boxes[layer, :, :slots]
                found = self.layer_losses(*rows, known, targets, known_count)
                losses |= {f"{prefix}dn_loss_{name}": loss for name, loss in found.items()}
        return losses

    def layer_losses(
        self, class_logits: Tensor, boxes: Tensor, pairs: Pairs, targets: Sequence[Target], count: Tensor
    ) -> dict[str, Tensor]:
        """Losses "cls", "bbox" and "iou" of one layer: (B, Q, num_classes) and (B, Q, 4), divided by `count`."""
        image, query, row = pairs
        labels = torch.cat([target.labels for target in targets])[row]
        wanted = torch.cat([target.boxes for target in targets])[row]
        scales = torch.stack([target.scale for target in targets])[image]
        one_hot = torch.zeros_like(class_logits)
        one_hot[image, query, labels] = 1
        found = boxes[image, query]
        corners, wanted_corners = (box_convert(x, "cxcywh", "xyxy") * scales for x in (found, wanted))
        sums = {
            "cls": self.class_weight
            * sigmoid_focal_loss(class_logits, one_hot, alpha=_ALPHA, gamma=_GAMMA, reduction="sum"),
            "bbox": self.box_weight * (found - wanted).abs().sum(),
            "iou": self.giou_weight * generalized_box_iou_loss(corners, wanted_corners, reduction="sum"),
        }
        return {name: value / count for name, value in sums.items()}


def _join(layer: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Target], device: torch.device) -> Pairs:
    """The matches of all images as indices into the batch and into the concatenated ground truth."""
    offset, image, query, row = 0, [], [], []
    for index, ((queries, rows), target) in enumerate(zip(layer, targets, strict=True)):
        image.append(torch.full_like(queries, index))
        query.append(queries)
        row.append(rows + offset)
        offset += len(target.labels)
    joined = torch.stack([torch.cat(parts) for parts in (image, query, row)]).to(device)
    return joined[0], joined[1], joined[2]


def _averaged(counts: Sequence[int], like: Tensor) -> Tensor:
    """Mean of the counts over processes, at least 1, and the float32 epsilon that the published division adds."""
    total = like.new_tensor(counts, dtype=torch.float32)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
        total = total / comm.get_world_size()
    return total.clamp(min=1) + torch.finfo(torch.float32).eps
