"""The real digits on their own as folders of images, one folder per class: what image classifiers learn from."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from piip_core.errors import check

from .data_folder import write_data_folder
from .scenes import SPLITS, load_samples, split_samples

__all__ = ["prepare_digit_images"]

_FORMAT = 1  # raise it when the same parameters would give other files


def prepare_digit_images(root: Path | str, *, image_size: int = 64) -> bool:
    """Writes scikit-learn's digits below a folder, unless they are there already; returns whether it wrote them.

    The folder then holds a PNG for each of the 1797 samples, `{train,val}/{0 ... 9}/{index}.png`, bright on black and
    smoothly enlarged, and a manifest. Every sample is in one split, the same as in the digit scenes.

    Args:
        root: Folder of the data set, commonly `datasets/digit_images`.
        image_size: Side of the images in pixels.

    Raises:
        UserError: If `image_size` is too small, or the folder holds something that this function did not write.
    """
    check(image_size >= 8, "image_size", image_size, "at least 8, the size of the samples")

    def write(folder: Path) -> None:
        samples = load_samples()
        for split in SPLITS:
            for index in tqdm(split_samples(split), desc=f"Writing {split} digits", unit="digit"):
                path = folder / split / str(samples.target[index]) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                # Samples have values from 0 to 16; with empty pixels around, digits stay in the image when they turn
                grey = np.pad(np.round(samples.images[index] * (255 / 16)).astype(np.uint8), 1)
                Image.fromarray(grey).resize((image_size, image_size), Image.Resampling.BICUBIC).save(path)

    return write_data_folder(Path(root), {"format": _FORMAT, "image_size": image_size}, write)
