"""Real handwritten digits on real photographs, made from what scikit-learn and scikit-image carry in their wheels.

Nothing is downloaded. The training and the validation split share no digit and no photograph:

* digits: the 1797 samples of :func:`sklearn.datasets.load_digits` (all different) are divided per class by a fixed
  permutation, every fourth sample going to validation;
* photographs: each belongs to one split as a whole (:data:`PHOTOS`), so no crop can occur in both.

The division does not depend on the seed of the scenes. Every scene has its own random generator, made from the seed,
the split and the scene's index: scene 17 is the same image whether 100 or 2000 are asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image
from skimage import color, data, morphology, transform
from sklearn.datasets import load_digits, load_sample_image
from sklearn.utils import Bunch
from tqdm import tqdm

from piip_core.errors import check, check_choice

SPLITS = ("train", "val")
# Photographs with writing or digits of their own (page, text, clock) would hold objects without a label: left out.
PHOTOS = {
    "train": ("astronaut", "brick", "camera", "china.jpg", "grass", "hubble_deep_field", "immunohistochemistry",
              "moon", "retina", "rocket", "stereo_motorcycle"),
    "val": ("chelsea", "coffee", "coins", "flower.jpg", "gravel"),
}  # fmt: skip
NUM_CLASSES = 10
Palette = tuple[tuple[str, tuple[float, float, float]], ...]
NAMED_COLOURS: Palette = (
    ("red", (1.0, 0.15, 0.1)),
    ("yellow", (1.0, 0.9, 0.1)),
    ("green", (0.1, 0.8, 0.2)),
    ("blue", (0.2, 0.45, 1.0)),
    ("pink", (1.0, 0.45, 0.85)),
    ("white", (1.0, 1.0, 1.0)),
)
"""A palette: bright colours, far from each other."""

_SPLIT_SEED = 20240601  # who is in which split; not a setting, so that no two runs can disagree about it
_INK_LEVEL = 0.45  # ink (0 to 1) from which a point belongs to the digit
_MIN_BRIGHTNESS = 0.5  # grey level of the digits; their outlines are dark, so they stand out from any photograph
_OUTLINE = 0.04  # width of the outline over the height of the digit
_MIN_DISTANCE = 0.5  # smallest distance in RGB between the colours of two digits in a scene
_MAX_DRAWS = 30  # tries to find a free position or a visible colour


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What the scenes look like; sizes in pixels, angles in degrees.

    With a palette of named colours, such as `NAMED_COLOURS`, every digit of a scene gets another one; without, random
    ones without a name. A ConfigError names a value that makes no scene possible.
    """

    image_size: int = 192
    min_digits: int = 3
    max_digits: int = 6
    min_digit_size: int = 36  # of the height of an upright digit
    max_digit_size: int = 84
    max_rotation: float = 20.0  # either way; 6 and 9 stay different
    min_visible: float = 0.85  # digits may overlap, but each keeps at least this part of its area in sight
    palette: Palette | None = None
    all_different: bool = False  # no two digits of a scene are the same
    middle_margin: float = 0.0  # part of the image by which digits stay away from both middle lines
    seed: int = 0  # of everything random but the split

    def __post_init__(self) -> None:
        digits, smallest, largest = self.max_digits, self.min_digit_size, self.max_digit_size
        check(1 <= self.min_digits <= digits, "min_digits", self.min_digits, f"1 to max_digits={digits}")
        check(8 <= smallest <= largest, "min_digit_size", smallest, f"8 to max_digit_size={largest}")
        # A turned digit is at most sqrt(2) times its size.
        room = int(self.image_size / 1.5)
        check(largest <= room, "max_digit_size", largest, f"at most {room} for image_size={self.image_size}")
        most = min(NUM_CLASSES if self.all_different else digits, len(self.palette or range(digits)))
        check(digits <= most, "max_digits", digits, f"at most {most}, of which no two have one class or colour")


@dataclass(frozen=True)
class Digit:
    """A digit in a scene."""

    label: int  # 0 to 9
    sample: int  # its index in sklearn.datasets.load_digits
    mask: np.ndarray  # (H, W) bool, the part in sight; the dark outline belongs to the digit
    colour: str | None = None  # its name in the palette

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tight box of the mask as COCO has it: x, y, width, height."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


@dataclass(frozen=True)
class Scene:
    """A photograph with digits on it."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    digits: list[Digit]  # from the lowest to the topmost
    photo: str  # name of the photograph


@cache
def split_samples(split: str) -> np.ndarray:
    """Indices into :func:`sklearn.datasets.load_digits` that belong to a split, sorted."""
    check_choice("split", split, SPLITS)
    target = load_samples().target
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for label in range(NUM_CLASSES):
        order = rng.permutation(np.flatnonzero(target == label))
        in_validation = np.arange(len(order)) % 4 == 0
        chosen.append(order[in_validation if split == "val" else ~in_validation])
    return np.sort(np.concatenate(chosen))


def render_scene(config: SceneConfig, split: str, index: int) -> Scene:
    """Draws a scene of "train" or "val", by its index; the masks of its digits do not overlap."""
    check_choice("split", split, SPLITS)
    rng = np.random.default_rng((config.seed, SPLITS.index(split), index))
    photo = PHOTOS[split][rng.integers(len(PHOTOS[split]))]
    image = photo_crop(load_photo(photo), config.image_size, rng)
    digits: list[Digit] = []
    areas: list[int] = []
    paints: list[np.ndarray] = []
    samples, colours, target = split_samples(split), list(config.palette or ()), load_samples().target
    for _ in range(rng.integers(config.min_digits, config.max_digits + 1)):
        # Even in the logarithm: as many digits between 30 and 45 pixels as between 60 and 90.
        size = np.exp(rng.uniform(np.log(config.min_digit_size), np.log(config.max_digit_size)))
        sample = int(rng.choice(samples))
        fill, outline = render_digit(sample, size, rng.uniform(-config.max_rotation, config.max_rotation))
        position = _find_position(outline > 0.5, digits, areas, config, rng)
        if position is None:  # the scene is full
            continue
        if config.palette is None:
            colour, paint = None, _pick_colour(paints, rng)
        else:
            colour, paint = colours.pop(rng.integers(len(colours)))
        paints.append(np.asarray(paint))
        window = _paint(image, position, fill, outline, paints[-1])
        mask = np.zeros(image.shape[:2], dtype=bool)
        mask[window] = outline > 0.5
        areas.append(int(mask.sum()))
        digits = [replace(below, mask=below.mask & ~mask) for below in digits]
        digits.append(Digit(int(target[sample]), sample, mask, colour))
        if config.all_different:
            samples = samples[target[samples] != target[sample]]
    return Scene(_as_uint8(image), digits, photo)


def scenes(config: SceneConfig, split: str, count: int) -> Iterator[Scene]:
    """The first scenes of a split, one by one."""
    return (render_scene(config, split, index) for index in range(count))


def digit_crops(split: str, count: int, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, size, size, 3) uint8 RGB of one digit each, about in the middle, and labels (count,) int64.

    Digits and photographs are divided into "train" and "val" exactly as for the scenes, whatever the `seed`.
    """
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for index in tqdm(range(count), desc=f"Drawing {split} digits", unit="digit"):
        rng = np.random.default_rng((seed, SPLITS.index(split), index, 1))
        image = photo_crop(load_photo(PHOTOS[split][rng.integers(len(PHOTOS[split]))]), size, rng)
        sample = int(rng.choice(split_samples(split)))
        fill, outline = render_digit(sample, rng.uniform(0.55, 0.7) * size, rng.uniform(-20.0, 20.0))
        # Turned digits may come out larger than the image: what sticks out is cut off.
        height, width = (min(length, size) for length in fill.shape)
        shift = rng.uniform(-0.06, 0.06, size=2) * size
        position = np.clip(np.round((size - np.array((height, width))) / 2 + shift), 0, (size - height, size - width))
        _paint(image, position.astype(int), fill[:height, :width], outline[:height, :width], _pick_colour([], rng))
        images[index] = _as_uint8(image)
        labels[index] = load_samples().target[sample]
    return images, labels


@cache
def load_samples() -> Bunch:
    """scikit-learn's digits, read once per process."""
    return load_digits()


@cache
def load_photo(name: str) -> np.ndarray:
    """A photograph as (H, W, 3) uint8."""
    if name.endswith(".jpg"):
        return load_sample_image(name)
    photo = getattr(data, name)()
    if isinstance(photo, tuple):  # the stereo pair: both images show the same scene, the left one will do
        photo = photo[0]
    if photo.ndim == 2:
        photo = color.gray2rgb(photo)
    if name == "retina":  # the corners are black
        photo = photo[250:-250, 250:-250]
    return photo


def photo_crop(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, resized to (size, size, 3) float64 in [0, 1]."""
    longest = min(photo.shape[:2])
    side = int(rng.uniform(min(size, longest), longest)) if longest > size else longest
    y, x = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(crop) / 255.0


def render_digit(sample: int, size: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A sample enlarged to `size` pixels of height and turned.

    Returns:
        Opacity, from 0 to 1, of the digit and of the digit with its outline, both (h, w) and cut to what is seen.
    """
    scale = size / 8
    # A margin of empty pixels lets the cubic spline fade out instead of ending at the border.
    source = np.pad(load_samples().images[sample] / 16.0, 2)
    centre = (source.shape[0] - 1) / 2
    side = int(np.ceil(size * 1.6)) + 4
    turn = (
        transform.AffineTransform(translation=(-centre, -centre))
        + transform.AffineTransform(scale=scale, rotation=np.deg2rad(angle))
        + transform.AffineTransform(translation=((side - 1) / 2, (side - 1) / 2))
    )
    grey = transform.warp(source, turn.inverse, output_shape=(side, side), order=3)
    # The enlarged strokes have edges as wide as a source pixel; sharpen them to about one and a half pixels.
    fill = np.clip((grey - _INK_LEVEL) * scale / 1.5 + 0.5, 0.0, 1.0)
    outline = morphology.dilation(fill, morphology.disk(max(1, round(size * _OUTLINE))))
    rows, columns = np.flatnonzero((outline > 0).any(axis=1)), np.flatnonzero((outline > 0).any(axis=0))
    seen = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return fill[seen], outline[seen]


def _find_position(
    mask: np.ndarray, digits: list[Digit], areas: list[int], config: SceneConfig, rng: np.random.Generator
) -> tuple[int, int] | None:
    """A random position (y, x), off the middle, where no digit below is hidden more than allowed, or None."""
    height, width = mask.shape
    for _ in range(_MAX_DRAWS):
        y, x = int(rng.integers(config.image_size - height + 1)), int(rng.integers(config.image_size - width + 1))
        window = np.s_[y : y + height, x : x + width]
        off_middle = min(abs(y + height / 2 - config.image_size / 2), abs(x + width / 2 - config.image_size / 2))
        if off_middle >= config.middle_margin * config.image_size and all(
            digit.mask.sum() - (digit.mask[window] & mask).sum() >= config.min_visible * area
            for digit, area in zip(digits, areas, strict=True)
        ):
            return y, x
    return None


def _paint(
    image: np.ndarray, position: Sequence[int], fill: np.ndarray, outline: np.ndarray, paint: np.ndarray
) -> tuple[slice, slice]:
    """Paints a digit on the image at position (y, x) and returns the window that it fills."""
    y, x = position
    window = np.s_[y : y + fill.shape[0], x : x + fill.shape[1]]
    image[window] *= 1.0 - outline[..., None]
    image[window] += fill[..., None] * (paint - image[window])
    return window


def _as_uint8(image: np.ndarray) -> np.ndarray:
    return (image * 255 + 0.5).astype(np.uint8)


def _pick_colour(used: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random bright colour (3,), unlike the colours used before."""
    paints = color.hsv2rgb(rng.uniform((0.0, 0.2, 0.7), (1.0, 1.0, 1.0), size=(_MAX_DRAWS, 3)))
    brightness = color.rgb2gray(paints)
    distance = np.min([np.linalg.norm(paints - other, axis=-1) for other in used] or [np.ones(_MAX_DRAWS)], axis=0)
    # The first colour that will do on both counts, or else the one that comes nearest to it.
    return paints[np.argmax(np.minimum(brightness / _MIN_BRIGHTNESS, 1.0) + np.minimum(distance / _MIN_DISTANCE, 1.0))]
