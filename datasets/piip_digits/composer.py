"""Images of digits, composed in batches as fast as a small network learns from them.

`scenes` draws every image on its own, in a few milliseconds; here digits are drawn once and photographs cut
once, and a batch moves, turns, colours and joins them as tensors. No two images are the same, and none is kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .scenes import PHOTOS, SPLITS, Palette, load_photo, load_samples, photo_crop, render_digit, split_samples

ABSENT = -100
"""Label of a digit that is not there; losses of PyTorch ignore it."""

_MAX_ROTATION = 0.35  # radians, as in the scenes
_STRETCH = 0.08  # largest change of the width, in the logarithm
_SHEAR = 0.15
_BRIGHTNESS = (0.6, 1.2)  # of the photographs
_MARGIN = 1.25  # side of the sprites over the height of the digits: outlines stick out
_APART = 0.55  # smallest distance of two digits along one axis, over the sum of their heights


class ComposedDigits(NamedTuple):
    """A batch of images with up to K digits each; where there are fewer, labels and colours are `ABSENT`."""

    images: Tensor  # (N, 3, S, S) float32 RGB from 0 to 1
    labels: Tensor  # (N, K) int64, the digits
    centres: Tensor  # (N, K, 2) float32, x and y of their centres in pixels
    colours: Tensor  # (N, K) int64, the index of each colour in the palette


class DigitComposer:
    """Composes images of digits somewhere on a photograph.

    Digits and photographs are divided exactly as for the scenes, so images of the two splits share neither.

    Args:
        split: "train" or "val".
        image_size: Side of the images in pixels.
        min_digit_size: Smallest height of an upright digit.
        max_digit_size: Largest height of an upright digit; at most two thirds of the image.
        max_digits: Most digits of an image. There may be fewer, but no digit covers another one.
        palette: Named colours of the digits.
        num_photos: How many pieces of photographs to cut.
    """

    def __init__(
        self,
        split: str,
        *,
        image_size: int = 64,
        min_digit_size: float = 28,
        max_digit_size: float = 44,
        max_digits: int = 1,
        palette: Palette,
        num_photos: int = 600,
    ) -> None:
        samples = split_samples(split)  # checks the split
        self.image_size, self.max_digits = image_size, max_digits
        self.digit_sizes = (min_digit_size, max_digit_size)
        self.palette = torch.tensor([rgb for _, rgb in palette])
        # Digits without colour: (N, 2, S, S) opacity of the digit and of the digit with its outline; labels (N,)
        self.opacity = _draw_opacity(samples, max_digit_size)
        self.labels = torch.from_numpy(load_samples().target[samples]).long()
        rng = np.random.default_rng((0, SPLITS.index(split)))
        names = PHOTOS[split]
        photos = [photo_crop(load_photo(names[rng.integers(len(names))]), image_size, rng) for _ in range(num_photos)]
        self.photos = torch.from_numpy(np.stack(photos).astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    def batch(self, count: int, generator: Generator, *, contrast: float = 1.0) -> ComposedDigits:
        """Composes images; the same state of the generator gives the same ones.

        Args:
            count: Number of images.
            generator: Source of everything random, on the CPU.
            contrast: Brightness of the photographs, from 0 (black) to 1. From scratch, networks learn the digits
                soonest if the photographs come up gradually.
        """
        height = _draw_uniform((count, self.max_digits), *np.log(self.digit_sizes), generator).exp()
        # From -1 to 1, such that the whole digit stays in the image
        reach = (1 - height * _MARGIN / self.image_size).clamp_min(0)
        centre = _draw_uniform((count, self.max_digits, 2), -1, 1, generator) * reach[..., None]
        present = self._choose_present(centre, height, generator)
        samples = torch.randint(len(self.labels), present.shape, generator=generator)
        colours = torch.randint(len(self.palette), present.shape, generator=generator)
        paints = self.palette[colours]
        index = present.nonzero()[:, 0]
        size = (len(index), 2, self.image_size, self.image_size)
        placements = self._draw_placements(centre[present], height[present], generator)
        grid = F.affine_grid(placements, size, align_corners=False)
        layers = F.grid_sample(self.opacity[samples[present]], grid, align_corners=False)
        ink, covered = layers.split(1, dim=1)
        images = self._choose_photographs(count, generator) * contrast
        images = images * (1 - torch.zeros_like(images[:, :1]).index_add_(0, index, covered))
        # Digits do not overlap, so they can be added; their outlines stay black
        images = images * (1 - torch.zeros_like(images[:, :1]).index_add_(0, index, ink))
        images = images.index_add_(0, index, ink * paints[present][:, :, None, None]).clamp_(0, 1)
        return ComposedDigits(
            images,
            self.labels[samples].where(present, ABSENT),
            (centre + 1) / 2 * self.image_size,
            colours.where(present, ABSENT),
        )

    def _choose_present(self, centre: Tensor, height: Tensor, generator: Generator) -> Tensor:
        """Which digits are in the images (N, K): a random number of them, without those that would touch another."""
        count, most = height.shape
        wanted = torch.randint(1, most + 1, (count,), generator=generator)
        present = torch.zeros(count, most, dtype=torch.bool)
        for k in range(most):
            distance = (centre[:, k : k + 1] - centre[:, :k]).abs().amax(dim=2) * self.image_size / 2
            free = distance > (height[:, k : k + 1] + height[:, :k]) * _APART
            present[:, k] = (free | ~present[:, :k]).all(dim=1) & (wanted > k)
        return present

    def _choose_photographs(self, count: int, generator: Generator) -> Tensor:
        photos = self.photos[torch.randint(len(self.photos), (count,), generator=generator)]
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        brightness = _draw_uniform((count, 1, 1, 1), *_BRIGHTNESS, generator)
        return (torch.where(mirrored, photos.flip(3), photos) * brightness).clamp_(0, 1)

    def _draw_placements(self, centre: Tensor, height: Tensor, generator: Generator) -> Tensor:
        """Affine maps (count, 2, 3) from points of the image to points of the sprite."""
        angle = _draw_uniform(height.shape, -_MAX_ROTATION, _MAX_ROTATION, generator)
        stretch = _draw_uniform(height.shape, -_STRETCH, _STRETCH, generator).exp()
        shear = _draw_uniform(height.shape, -_SHEAR, _SHEAR, generator)
        # A sprite is as high as the largest digit and a margin
        scale = self.image_size / (self.opacity.shape[-1] * height / self.digit_sizes[1])
        cos, sin = angle.cos(), angle.sin()
        linear = torch.stack((cos * stretch, shear - sin, sin * stretch, cos), dim=1).view(-1, 2, 2)
        linear = linear * scale[:, None, None]
        return torch.cat((linear, -linear @ centre[:, :, None]), dim=2)


def _draw_opacity(samples: np.ndarray, height: float) -> Tensor:
    side = int(np.ceil(height * _MARGIN))
    opacity = np.zeros((len(samples), 2, side, side), dtype=np.float32)
    for target, sample in zip(opacity, samples, strict=True):
        layers = np.stack(render_digit(int(sample), height, 0.0))[:, :side, :side]
        top, left = ((side - length) // 2 for length in layers.shape[1:])
        target[:, top : top + layers.shape[1], left : left + layers.shape[2]] = layers
    return torch.from_numpy(opacity)


def _draw_uniform(shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator) * (high - low) + low
