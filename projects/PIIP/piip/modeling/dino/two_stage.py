"""Proposals from the encoder, and the selection of those that queries start from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .positions import Levels

__all__ = ["Selection", "grid_proposals", "select_proposals"]

_BASE_SIDE = 0.05  # of the image, on the largest map; doubles with every level
_BORDER = 0.01  # proposals nearer to 0 or 1 than this are none


class Selection(NamedTuple):
    """The best Q proposals of every image, best first.

    Attributes:
        cells: (B, Q) index of the cell of each.
        class_logits: (B, Q, num_classes).
        box_logits: (B, Q, 4); +inf for cells that have no proposal, which are chosen where others do not suffice.
    """

    cells: Tensor
    class_logits: Tensor
    box_logits: Tensor

    @property
    def boxes(self) -> Tensor:
        """(B, Q, 4) in (cx, cy, w, h), with gradient."""
        return self.box_logits.sigmoid()


def grid_proposals(levels: Levels) -> tuple[Tensor, Tensor]:
    """A square proposal at every cell, larger on smaller maps.

    Returns:
        Logits (B, S, 4) of (cx, cy, w, h), +inf where there is no proposal, and (B, S) bool: where there is one.
        Padding has none, and cells at the very border have none.
    """
    centres = levels.cell_centres()
    sides = [centres.new_full((height * width,), _BASE_SIDE * 2**i) for i, (height, width) in enumerate(levels.shapes)]
    sides = torch.cat(sides)[:, None].expand_as(centres)
    proposals = torch.cat((centres, sides), dim=-1)
    inside = ((proposals > _BORDER) & (proposals < 1 - _BORDER)).all(dim=-1)
    valid = inside & ~levels.padding_mask
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~valid[..., None], torch.inf), valid


def select_proposals(class_logits: Tensor, num_queries: int) -> Tensor:
    """(B, Q) cells with the highest logit of any class, best first, of `class_logits` (B, S, num_classes).

    Raises:
        ValueError: If there are fewer cells than queries.
    """
    if class_logits.shape[1] < num_queries:
        raise ValueError(
            f"num_queries={num_queries} on maps of {class_logits.shape[1]} cells in all: expected at most one query "
            "per cell; use larger images or fewer queries"
        )
    return class_logits.amax(dim=-1).topk(num_queries, dim=1).indices
