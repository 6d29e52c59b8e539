"""The real digits on their own as folders of images, one folder per class: what image classifiers learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .data_folder import write_data_folder
from .scenes import SPLITS, load_samples, split_samples

__all__ = ["prepare_digit_images"]

_FORMAT = 1  # raise it when the same parameters would give other files
_MARGIN = 1  # empty pixels around the 8 x 8 of a sample, so that turned digits stay in the picture
_INK = 16  # scikit-learn's digits have values from 0 to 16


def prepare_digit_images(root: Path | str, *, image_size: int = 64) -> bool:
    """Writes scikit-learn's digits below a folder, unless they are there already.

    The folder then holds a PNG for each of the 1797 samples, `{train,val}/{0 ... 9}/{index}.png`, bright on black and
    smoothly enlarged, and a manifest. Every sample is in one split, the same as in the digit scenes.

    Args:
        root: Folder of the data set, commonly `datasets/digit_images`.
        image_size: Side of the images in pixels.

    Returns:
        True if it was written, False if it was there.

    Raises:
        ValueError: If `image_size` is too small.
        FileExistsError: If the folder holds something that this function did not write.
    """
    if image_size < 8:
        raise ValueError(f"image_size={image_size}: expected at least 8, the size of the samples")

    def write(folder: Path) -> None:
        samples = load_samples()
        for split in SPLITS:
            for label in np.unique(samples.target):
                (folder / split / str(label)).mkdir(parents=True)
            for index in tqdm(split_samples(split), desc=f"Writing {split} digits", unit="digit"):
                path = folder / split / str(samples.target[index]) / f"{index:04d}.png"
                _enlarged(samples.images[index], image_size).save(path)

    return write_data_folder(Path(root), {"format": _FORMAT, "image_size": image_size}, write)


def _enlarged(sample: np.ndarray, image_size: int) -> Image.Image:
    grey = np.pad(np.round(sample * (255 / _INK)).astype(np.uint8), _MARGIN)
    return Image.fromarray(grey).resize((image_size, image_size), Image.Resampling.BICUBIC)
