"""What the branches of a model look at in an image: the panel of the web page."""

from __future__ import annotations

import io

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from piip_core.visualization import draw_attention, draw_sampling, find_pyramid, prepare_scene, trace_pyramid

from ..inference import ChatModel


def look(
    chat: ChatModel, image: Image.Image, *, at: tuple[int, int] | None = None, depth: float = 0.5
) -> tuple[Image.Image, Image.Image | None]:
    """Runs the vision tower on an image and draws what one point of it attends to (paper section IV-G).

    Not to be called while the same model answers: the blocks are watched meanwhile.

    Args:
        chat: The model.
        image: RGB.
        at: The point, (x, y) in pixels of `network_view`; None for the middle.
        depth: Which block of each branch, and which interaction: 0 the first, 1 the last.

    Returns:
        Self-attention of the point in a block of every branch, over the image; and what the point reads from the other
        branches, None for a single branch.

    Raises:
        UserError: If the point is out of range.
    """
    view, pixels = _prepare(chat, image)
    pyramid = find_pyramid(chat.model)
    scene = prepare_scene(view.shape[:2], view, pixels.to(next(pyramid.parameters()).dtype), at)
    blocks = [round(depth * (branch.num_blocks - 1)) for branch in pyramid.branches]
    count = len(pyramid.interactions)
    interaction = round(depth * (count - 1)) if count else None
    trace = trace_pyramid(pyramid, scene, blocks=blocks, interaction=interaction)
    attention = draw_attention(scene, trace, "What the marked place attends to, mean over the heads")
    if not trace.readings:
        return _as_image(attention), None
    title = f"What it reads from other branches, interaction {interaction + 1} of {count}"
    return _as_image(attention), _as_image(draw_sampling(scene, trace, title))


def network_view(chat: ChatModel, image: Image.Image) -> Image.Image:
    """An image as the vision tower gets it: a square of its size, which is the same to the model."""
    return Image.fromarray(_prepare(chat, image)[0])


def _prepare(chat: ChatModel, image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
    """What the tower gets, as an image (S, S, 3) uint8 and as values (1, 3, S, S)."""
    processor = chat.processor.image_processor
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = ((pixels[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return shown.permute(1, 2, 0).numpy(), pixels


def _as_image(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
