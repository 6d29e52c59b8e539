"""Pictures of one digit each, composed in batches as fast as a small network learns from them.

`digit_scenes` draws every picture on its own, in a few milliseconds; here digits are drawn once and photographs cut
once, and a batch moves, turns, colours and joins them as tensors. No two pictures are the same, and none is kept.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .digit_scenes import PHOTOS, SPLITS, _digits, _load_photo, _photo_crop, _render_digit, split_samples

__all__ = ["DigitComposer"]

_MAX_ROTATION = 0.35  # radians, as in the scenes
_STRETCH = 0.08  # largest change of the width, in the logarithm
_SHEAR = 0.15
_MAX_SATURATION, _MIN_VALUE = 0.9, 0.75  # bright colours and white
_BRIGHTNESS = (0.6, 1.2)  # of the photographs
_MARGIN = 1.25  # side of the sprites over the height of the digits: outlines stick out


@dataclass(frozen=True)
class _Sprites:
    """Digits without colour: (N, 2, S, S) opacity of the digit and of the digit with its outline; labels (N,)."""

    opacity: Tensor
    labels: Tensor


class DigitComposer:
    """Composes pictures of one digit somewhere on a photograph.

    Digits and photographs are divided exactly as for the scenes, so pictures of the two splits share neither.

    Args:
        split: "train" or "val".
        image_size: Side of the pictures in pixels.
        min_digit_size: Smallest height of an upright digit in pixels.
        max_digit_size: Largest height of an upright digit; at most two thirds of the picture.
        num_photos: How many pieces of photographs to cut.
        seed: Chooses those pieces.

    Raises:
        ValueError: If `split` is unknown or the sizes do not fit; the message names the value.
    """

    def __init__(
        self,
        split: str,
        *,
        image_size: int = 64,
        min_digit_size: float = 28,
        max_digit_size: float = 44,
        num_photos: int = 600,
        seed: int = 0,
    ) -> None:
        samples = split_samples(split)  # checks the split
        if not 8 <= min_digit_size <= max_digit_size or max_digit_size * 1.5 > image_size + 2:
            raise ValueError(
                f"min_digit_size={min_digit_size}, max_digit_size={max_digit_size}: expected "
                f"8 <= min <= max <= {int((image_size + 2) / 1.5)} for image_size={image_size}"
            )
        self.image_size = image_size
        self.digit_sizes = (min_digit_size, max_digit_size)
        self.sprites = _draw_sprites(samples, max_digit_size)
        rng = np.random.default_rng((seed, SPLITS.index(split)))
        names = PHOTOS[split]
        photos = [_photo_crop(_load_photo(names[rng.integers(len(names))]), image_size, rng) for _ in range(num_photos)]
        self.photos = torch.from_numpy(np.stack(photos).astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    def batch(self, count: int, generator: Generator, *, contrast: float = 1.0) -> tuple[Tensor, Tensor]:
        """Composes pictures; the same state of the generator gives the same ones.

        Args:
            count: Number of pictures.
            generator: Source of everything random, on the CPU.
            contrast: Brightness of the photographs, from 0 (black) to 1. From scratch, networks learn the digits
                soonest if the photographs come up gradually.

        Returns:
            Pictures (count, 3, S, S) float32 RGB from 0 to 1, and labels (count,) int64.
        """
        chosen = torch.randint(len(self.sprites.labels), (count,), generator=generator)
        size = (count, 2, self.image_size, self.image_size)
        grid = F.affine_grid(self._placements(count, generator), size, align_corners=False)
        digit, outlined = F.grid_sample(self.sprites.opacity[chosen], grid, align_corners=False).split(1, dim=1)
        photos = self.photos[torch.randint(len(self.photos), (count,), generator=generator)]
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        brightness = _uniform(count, *_BRIGHTNESS, generator)[:, None, None, None]
        images = (torch.where(mirrored, photos.flip(3), photos) * brightness).clamp_(0, 1) * contrast
        images = images * (1 - outlined)
        images = images + digit * (_colours(count, generator)[:, :, None, None] - images)
        return images, self.sprites.labels[chosen]

    def _placements(self, count: int, generator: Generator) -> Tensor:
        """Affine maps (count, 2, 3) from points of the picture to points of the sprite."""
        smallest, largest = np.log(self.digit_sizes)
        height = _uniform(count, smallest, largest, generator).exp()
        angle = _uniform(count, -_MAX_ROTATION, _MAX_ROTATION, generator)
        stretch = _uniform(count, -_STRETCH, _STRETCH, generator).exp()
        shear = _uniform(count, -_SHEAR, _SHEAR, generator)
        # A sprite is as high as the largest digit and a margin
        scale = self.image_size / (self.sprites.opacity.shape[-1] * height / self.digit_sizes[1])
        cos, sin = angle.cos(), angle.sin()
        linear = torch.stack((cos * stretch, shear - sin, sin * stretch, cos), dim=1).view(-1, 2, 2)
        linear = linear * scale[:, None, None]
        # The whole digit stays in the picture
        reach = (1 - height * _MARGIN / self.image_size).clamp_min(0)
        centre = torch.stack([_uniform(count, -1, 1, generator) * reach for _ in range(2)], dim=1)[:, :, None]
        return torch.cat((linear, -linear @ centre), dim=2)


def _draw_sprites(samples: np.ndarray, height: float) -> _Sprites:
    side = int(np.ceil(height * _MARGIN))
    opacity = np.zeros((len(samples), 2, side, side), dtype=np.float32)
    for target, sample in zip(opacity, samples, strict=True):
        layers = np.stack(_render_digit(int(sample), height, 0.0))[:, :side, :side]
        top, left = ((side - length) // 2 for length in layers.shape[1:])
        target[:, top : top + layers.shape[1], left : left + layers.shape[2]] = layers
    return _Sprites(torch.from_numpy(opacity), torch.from_numpy(_digits().target[samples]).long())


def _colours(count: int, generator: Generator) -> Tensor:
    """Bright random colours (count, 3), from hue, saturation and value."""
    hue = _uniform(count, 0, 6, generator)[:, None]
    saturation = _uniform(count, 0, _MAX_SATURATION, generator)[:, None]
    value = _uniform(count, _MIN_VALUE, 1, generator)[:, None]
    sector = (torch.tensor([5.0, 3.0, 1.0]) + hue) % 6
    return value * (1 - saturation * torch.minimum(sector, 4 - sector).clamp(0, 1))


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low
