"""An image, and beside it the best classes as bars."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

_TRACK, _INK, _BEST, _OTHERS = (232, 234, 237), (32, 33, 36), (26, 115, 232), (150, 187, 240)
_LONGEST_NAME = 22  # characters


def draw_bars(image: np.ndarray, classes: Sequence[tuple[str, float]]) -> np.ndarray:
    """Sets a bar per class beside an image (H, W, 3), uint8 RGB: name and score (0 to 1), from top to bottom.

    Images that are smaller than the bars are enlarged by a whole number. The size of the result (H', W', 3), uint8 RGB,
    depends on those of the image and on the number of classes.
    """
    height, width = image.shape[:2]
    text = max(16, round((height * width) ** 0.5 / 28))  # height of the letters, and unit of what follows
    row, bars_width, bars_height = round(2.5 * text), 19 * text, round(2.5 * text) * len(classes) + 2 * text
    factor = max(1, -(-bars_height // max(height, width)))
    canvas = Image.new("RGB", (width * factor + bars_width, max(height * factor, bars_height)), "white")
    canvas.paste(Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST))
    draw, font, left, right = ImageDraw.Draw(canvas), _font(text), width * factor + text, canvas.width - text
    for index, (name, score) in enumerate(classes):
        top = text + index * row
        name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        draw.text((left, top), name, _INK, font)
        draw.text((right, top), f"{score:.1%}", _INK, font, anchor="ra")
        top, bottom = top + round(1.25 * text), top + round(1.8 * text)
        draw.rectangle((left, top, right, bottom), _TRACK)
        draw.rectangle((left, top, left + round(score * (right - left)), bottom), _OTHERS if index else _BEST)
    return np.asarray(canvas)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # comes with matplotlib
