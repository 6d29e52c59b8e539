"""Which published row a checkpoint is, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from piip_core import zoo
from piip_core.checkpoints import PublishedNames, from_published
from piip_core.errors import CheckpointError, NotSupportedYet

from .names import PUBLISHED_TOWER, LlavaNames

__all__ = ["recognise_row"]

_EMBEDDINGS = "model.embed_tokens.weight"


def recognise_row(shapes: Mapping[str, Sequence[int]]) -> zoo.MultimodalEntry:
    """Finds the published row that a state dict belongs to; of rows that differ in their training alone the first.

    Args:
        shapes: Published name -> shape.

    Raises:
        CheckpointError: If no row fits.
    """
    width = tuple(shapes.get(_EMBEDDINGS, ()))[-1:]
    for entry in zoo.multimodal_entries():
        if width == (entry.embed_dim,) and len(entry.vision.branches) > 1 and _fits(shapes, entry):
            return entry
    raise CheckpointError(
        "the tensors fit no published row; name it (--row), or give the vision configuration (--vision-config). Rows "
        "are " + ", ".join(entry.name for entry in zoo.multimodal_entries())
    )


def _fits(shapes: Mapping[str, Sequence[int]], entry: zoo.MultimodalEntry) -> bool:
    tower = {
        key.removeprefix(PUBLISHED_TOWER): torch.empty(tuple(shape), device="meta")
        for key, shape in shapes.items()
        if key.startswith(PUBLISHED_TOWER)
    }
    try:
        classes = LlavaNames.of_published(shapes, entry.vision).branch_classes
        names = PublishedNames(entry.vision, classes, scale="weight")
        return from_published(tower, entry.vision, names=names, dtype=None)[1].complete
    except (CheckpointError, NotSupportedYet):
        return False
