"""An image, and beside it the best classes as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

# Lengths below are in heights of the text, which grows with the image and stays readable on small ones
_LEAST_TEXT, _TEXT_PER_IMAGE = 16, 1 / 28  # pixels; of the square root of the image's area
_ROW, _BAR, _MARGIN, _WIDTH = 2.5, 0.55, 1.0, 19.0
_PAPER, _TRACK, _INK, _BEST, _OTHERS = (255, 255, 255), (232, 234, 237), (32, 33, 36), (26, 115, 232), (150, 187, 240)


def draw_bars(image: np.ndarray, classes: Sequence[tuple[str, float]]) -> np.ndarray:
    """Sets a bar per class beside an image (H, W, 3), uint8 RGB: name and score (0 to 1), from top to bottom.

    Images that are smaller than the bars are enlarged by a whole number, names that are too long are cut. The size of
    the result (H', W', 3), uint8 RGB, depends on those of the image and on the number of classes.
    """
    height, width = image.shape[:2]
    text = max(_LEAST_TEXT, round(math.sqrt(height * width) * _TEXT_PER_IMAGE))
    bars_height = round((_ROW * len(classes) + 2 * _MARGIN) * text)
    factor = max(1, math.ceil(bars_height / max(height, width)))
    shown = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    size = shown.width + round(_WIDTH * text), max(shown.height, bars_height)
    canvas = Image.new("RGB", size, _PAPER)
    canvas.paste(shown, (0, (canvas.height - shown.height) // 2))
    margin, draw, font = round(_MARGIN * text), ImageDraw.Draw(canvas), _font(text)
    left, right = shown.width + margin, canvas.width - margin
    for index, (name, score) in enumerate(classes):
        top = (canvas.height - bars_height) // 2 + round((_MARGIN + index * _ROW) * text)
        percent = f"{score:.1%}"
        draw.text((right, top), percent, _INK, font, anchor="ra")
        space = right - left - font.getlength(percent) - text
        draw.text((left, top), _shortened(name, font, space), _INK, font, anchor="la")
        top += round(1.25 * text)
        bottom, end = top + round(_BAR * text), left + round(min(max(score, 0.0), 1.0) * (right - left))
        draw.rectangle((left, top, right, bottom), _TRACK)
        draw.rectangle((left, top, end, bottom), _OTHERS if index else _BEST)
    return np.asarray(canvas)


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
