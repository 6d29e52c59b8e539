"""Contrastive denoising (DINO, section 3.3): noised ground truth as extra queries in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .geometry import Target, inverse_sigmoid


@dataclass(frozen=True)
class DenoisingLayout:
    """Which slot holds which ground truth.

    Every group has a positive half of `half` slots and a negative one; box t of an image takes slot t of each half.
    Images with fewer boxes than the fullest one leave slots empty. A row stands for one box in one half: the boxes of
    all images in order, once for every half. For every row (rows,), there are its image, its slot, the index of its box
    in the concatenated boxes of all images, and whether it lies in a positive half.
    """

    num_groups: int
    half: int
    image: Tensor
    slot: Tensor
    box: Tensor
    positive: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], num_denoising: int, device: torch.device | str | None = None) -> DenoisingLayout:
        """Layout for images with `counts` boxes and about `num_denoising` boxes, each positive and negative, in all."""
        half = max(counts) if num_denoising else 0
        counts = counts if half else [0] * len(counts)
        groups = max(1, num_denoising // half) if half else 1
        total, halves = sum(counts), 2 * groups
        image = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
        within = torch.cat([torch.arange(count, device=device) for count in counts])
        repetition = torch.arange(halves, device=device).repeat_interleave(total)
        return cls(
            num_groups=groups,
            half=half,
            image=image.repeat(halves),
            slot=repetition * half + within.repeat(halves),
            box=torch.arange(total, device=device).repeat(halves),
            positive=repetition % 2 == 0,
        )

    @property
    def size(self) -> int:
        """Number of slots."""
        return 2 * self.half * self.num_groups

    def attention_mask(self, num_queries: int) -> Tensor:
        """(size + Q, size + Q) bool, True = blocked: groups and the Q queries after them see no (other) group."""
        device = self.slot.device
        group = torch.arange(self.size, device=device) // (2 * self.half or 1)
        group = torch.cat((group, group.new_full((num_queries,), -1)))
        return (group[:, None] != group[None, :]) & (group[None, :] >= 0)


@dataclass(frozen=True)
class DenoisingDraws:
    """Random numbers of one batch, in the order in which they are drawn."""

    label: Tensor  # (rows,) uniform in [0, 1): rows below half the label noise get another class
    new_label: Tensor  # (such rows,) the classes
    sign: Tensor  # (rows, 4) 0 or 1: which way each corner coordinate moves
    distance: Tensor  # (rows, 4) uniform in [0, 1): how far, in halves of the box; one more for negatives


@dataclass(frozen=True)
class DenoisingQueries:
    """What goes before the matching queries, and the noised labels (rows,) and boxes (rows, 4) that it was made from.

    Boxes are (cx, cy, w, h), whose sides may be zero or negative. `content` (B, slots, embed_dim) and `box_logits`
    (B, slots, 4), without gradient, are zero in empty slots.
    """

    layout: DenoisingLayout
    labels: Tensor
    boxes: Tensor
    content: Tensor
    box_logits: Tensor


class ContrastiveDenoising:
    """Makes denoising queries: positives are to find their box again, negatives, noised more, are background.

    Args:
        num_denoising: number of positives per image, as far as whole groups fit; at least one group. 0 turns the
            denoising off.
        label_noise: half of it is the share of labels that are drawn anew.
        box_noise: largest move of a positive's corner, in halves of the box; negatives move up to twice as far.
    """

    def __init__(self, num_denoising: int = 100, label_noise: float = 0.5, box_noise: float = 1.0) -> None:
        if num_denoising < 0:
            raise ValueError(f"num_denoising={num_denoising}: expected at least 0")
        self.num_denoising, self.label_noise, self.box_noise = num_denoising, label_noise, box_noise

    def draw(self, num_rows: int, num_classes: int, device: torch.device) -> DenoisingDraws:
        """Random numbers for `num_rows` rows."""
        label = torch.rand(num_rows, device=device)
        chosen = int(self.relabelled(label).sum())
        return DenoisingDraws(
            label=label,
            new_label=torch.randint(num_classes, (chosen,), device=device),
            sign=torch.randint(2, (num_rows, 4), device=device).float(),
            distance=torch.rand(num_rows, 4, device=device),
        )

    def relabelled(self, label_draws: Tensor) -> Tensor:
        """(rows,) bool: rows that get a new class."""
        return label_draws < self.label_noise * 0.5

    def __call__(
        self, targets: Sequence[Target], label_embed: nn.Embedding, draws: DenoisingDraws | None = None
    ) -> DenoisingQueries:
        """Noises the ground truth of a batch; `label_embed` has the content of a query for each class.

        Without any box there are no queries, but `content` still hangs on `label_embed`.
        """
        device = label_embed.weight.device
        layout = DenoisingLayout.of([len(target.labels) for target in targets], self.num_denoising, device)
        if draws is None:
            draws = self.draw(len(layout.slot), label_embed.num_embeddings, device)
        labels = torch.cat([target.labels for target in targets])[layout.box]
        boxes = torch.cat([target.boxes for target in targets])[layout.box]
        labels = labels.masked_scatter(self.relabelled(draws.label), draws.new_label)
        boxes = self._noised(boxes, layout.positive, draws)
        slots, index = (len(targets), layout.size), (layout.image, layout.slot)
        content = label_embed(labels)
        return DenoisingQueries(
            layout=layout,
            labels=labels,
            boxes=boxes,
            content=content.new_zeros(*slots, content.shape[-1]).index_put(index, content),
            box_logits=boxes.new_zeros(*slots, 4).index_put(index, inverse_sigmoid(boxes)),
        )

    def _noised(self, boxes: Tensor, positive: Tensor, draws: DenoisingDraws) -> Tensor:
        distance = draws.distance + (~positive)[:, None].to(boxes.dtype)
        move = (2 * draws.sign - 1) * distance * self.box_noise * (boxes[:, 2:] / 2).repeat(1, 2)
        corners = box_convert(boxes, "cxcywh", "xyxy") + move
        return box_convert(corners.clamp(min=0, max=1), "xyxy", "cxcywh")
