"""What the branches of a model look at in a picture: the panel of the web page."""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.figure import Figure
from PIL import Image

from piip_core.errors import UserError
from piip_core.visualization import draw_attention, draw_sampling, find_pyramid, prepare_scene, trace_pyramid

from .generation import ChatModel
from .pictures import prepare_picture

__all__ = ["Look", "look"]


@dataclass(frozen=True)
class Look:
    """Pictures of one look into the vision tower.

    Attributes:
        attention: Self-attention of the query in a block of every branch, over the picture.
        sampling: What the query reads from the other branches; None for a single branch.
    """

    attention: Image.Image
    sampling: Image.Image | None


def look(chat: ChatModel, image: Image.Image, *, at: tuple[int, int] | None = None, depth: float = 0.5) -> Look:
    """Runs the vision tower on a picture and draws what one place of it attends to (paper section IV-G).

    Not to be called while the same model answers: the blocks are watched meanwhile.

    Args:
        chat: The model.
        image: RGB.
        at: The place, (x, y) in pixels of `network_view`; None for the middle.
        depth: Which block of each branch, and which interaction: 0 the first, 1 the last.

    Raises:
        UserError: If place or depth are out of range.
        ConfigError: If the model has no PIIP as its vision tower.
    """
    if not 0 <= depth <= 1:
        raise UserError(f"depth={depth!r}: expected 0 to 1")
    picture, pixels = prepare_picture(chat, image)
    pyramid = find_pyramid(chat.model)
    scene = prepare_scene(picture.shape[:2], picture, pixels.to(next(pyramid.parameters()).dtype), at)
    blocks = [_share(depth, branch.num_blocks) for branch in pyramid.branches]
    interaction = _share(depth, len(pyramid.interactions)) if pyramid.interactions else None
    trace = trace_pyramid(pyramid, scene, blocks=blocks, interaction=interaction)
    attention = draw_attention(scene, trace, "What the marked place attends to, mean over the heads")
    sampling = None
    if trace.readings:
        title = f"What it reads from other branches, interaction {interaction + 1} of {len(pyramid.interactions)}"
        sampling = _drawn(draw_sampling(scene, trace, title))
    return Look(_drawn(attention), sampling)


def _share(depth: float, count: int) -> int:
    return round(depth * (count - 1))


def _drawn(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
