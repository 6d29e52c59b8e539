"""The picture of a classified image: the image, and beside or below it the best classes as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_bars"]

# Lengths below are in heights of the text, which grows with the image and stays readable on small ones
_LEAST_TEXT, _TEXT_PER_IMAGE = 16, 1 / 28  # pixels; of the square root of the image's area
_ROW, _BAR, _MARGIN, _WIDTH = 2.5, 0.55, 1.0, 19.0
_WIDE = 2.0  # images with a larger ratio of width to height have the bars below them
_PAPER, _TRACK, _INK, _BEST, _OTHERS = (255, 255, 255), (232, 234, 237), (32, 33, 36), (26, 115, 232), (150, 187, 240)


def draw_bars(image: np.ndarray, classes: Sequence[tuple[str, float]]) -> np.ndarray:
    """Sets bars beside an image, or below a wide one.

    Images that are smaller than the bars are enlarged by a whole number. Names that are too long are cut.

    Args:
        image: (H, W, 3) uint8, RGB.
        classes: Name and score (0 to 1) of each bar, from top to bottom.

    Returns:
        (H', W', 3) uint8, RGB; its size depends on those of the image and on the number of classes.
    """
    height, width = image.shape[:2]
    text = max(_LEAST_TEXT, round(math.sqrt(height * width) * _TEXT_PER_IMAGE))
    panel_height = round((_ROW * len(classes) + 2 * _MARGIN) * text)
    enlarged = max(1, math.ceil(panel_height / max(height, width)))
    picture = Image.fromarray(image).resize((width * enlarged, height * enlarged), Image.Resampling.NEAREST)
    below = picture.width > _WIDE * picture.height
    panel_width = max(round(_WIDTH * text), picture.width if below else 0)
    panel = _panel(classes, text, (panel_width, panel_height))
    if below:
        canvas = Image.new("RGB", (panel.width, picture.height + panel.height), _PAPER)
        places = (0, 0), (0, picture.height)
    else:
        canvas = Image.new("RGB", (picture.width + panel.width, max(picture.height, panel.height)), _PAPER)
        places = tuple((x, (canvas.height - part.height) // 2) for x, part in ((0, picture), (picture.width, panel)))
    for part, place in zip((picture, panel), places, strict=True):
        canvas.paste(part, place)
    return np.asarray(canvas)


def _panel(classes: Sequence[tuple[str, float]], text: int, size: tuple[int, int]) -> Image.Image:
    """The bars alone, in a picture of `size` (width, height)."""
    left, right = round(_MARGIN * text), size[0] - round(_MARGIN * text)
    panel = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(panel), _font(text)
    for number, (name, score) in enumerate(classes):
        top = round((_MARGIN + number * _ROW) * text)
        percent = f"{score:.1%}"
        draw.text((right, top), percent, _INK, font, anchor="ra")
        space = right - left - font.getlength(percent) - text
        draw.text((left, top), _shortened(name, font, space), _INK, font, anchor="la")
        top += round(1.25 * text)
        bar = round(_BAR * text)
        draw.rectangle((left, top, right, top + bar), _TRACK)
        end = left + round(min(max(score, 0.0), 1.0) * (right - left))
        draw.rectangle((left, top, end, top + bar), _OTHERS if number else _BEST)
    return panel


def _shortened(name: str, font: ImageFont.FreeTypeFont, space: float) -> str:
    name = " ".join(name.split())
    if font.getlength(name) <= space:
        return name
    while name and font.getlength(f"{name}…") > space:
        name = name[:-1]
    return f"{name.rstrip(' ,')}…"


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # comes with matplotlib
