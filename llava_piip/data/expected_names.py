"""Giving images the names that an annotation file expects.

The tuning set names every OCR-VQA image `.jpg`; the download script keeps the endings of the addresses, so that some
lie there as `.gif` or `.png`.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from piip_core.files import atomic_path

from .images import ImageFolder
from .problems import DataError

__all__ = ["NameRepair", "provide_expected_names"]

# In this order if there are several
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class NameRepair:
    """What `provide_expected_names` found and did; paths are relative to the image root.

    Attributes:
        present: Number of images that were there.
        linked: Expected name -> the file that now also has it.
        converted: Expected name -> the file it was converted from.
        unreadable: Expected name -> why the files of the same stem are of no use.
        missing: Expected names without any file of the same stem.
    """

    present: int = 0
    linked: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every image has its expected name now."""
        return not (self.unreadable or self.missing)


def provide_expected_names(
    names: Iterable[str],
    image_root: str | os.PathLike[str],
    *,
    convert: bool = False,
    follow_links: bool = False,
    progress: bool = True,
) -> NameRepair:
    """Makes images available under expected names when they lie beside them with another ending.

    The files found stay as they are: the expected name becomes a hard link (on file systems without links a copy),
    which keeps the pixels; the ending does not matter for reading. With `convert` it becomes a JPEG of the first frame.

    Args:
        names: Expected paths, relative to `image_root`.
        image_root: Folder.
        convert: Write JPEGs.
        follow_links: Whether links below the folder may lead out of it.
        progress: Show a progress bar.
    """
    images, repair = ImageFolder(image_root, follow_links=follow_links), NameRepair()
    by_folder: dict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
    for name in dict.fromkeys(names):
        by_folder[PurePosixPath(name).parent].append(PurePosixPath(name))
    bar = tqdm(total=sum(map(len, by_folder.values())), desc="Names", unit="image", disable=None if progress else True)
    with bar:
        for folder, expected in by_folder.items():
            present = _names_by_stem(images.root / folder)
            for name in expected:
                others = present.get(name.stem, [])
                if name.name in others:
                    repair.present += 1
                else:
                    _provide(repair, images, name, others, convert)
                bar.update()
    return repair


def _names_by_stem(folder: Path) -> dict[str, list[str]]:
    """The image files of a folder that are not empty, in the order of preference."""
    found: dict[str, list[str]] = defaultdict(list)
    if folder.is_dir():
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in IMAGE_SUFFIXES and entry.is_file() and entry.stat().st_size:
                found[stem].append(entry.name)
    for names in found.values():
        names.sort(key=lambda name: IMAGE_SUFFIXES.index(os.path.splitext(name)[1].lower()))
    return found


def _provide(repair: NameRepair, images: ImageFolder, name: PurePosixPath, others: list[str], convert: bool) -> None:
    """Makes one image available from files of the same stem."""
    reasons = []
    for other in others:
        source = str(name.parent / other)
        try:
            image = images.open(source)
        except DataError as error:
            reasons.append(str(error))
            continue
        if convert:
            _convert(image, images.root / name)
            repair.converted[str(name)] = source
        else:
            _link(images.locate(source), images.root / name)
            repair.linked[str(name)] = source
        return
    if reasons:
        repair.unreadable[str(name)] = "; ".join(reasons)
    else:
        repair.missing.append(str(name))


def _convert(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as aside:
        image.save(aside, format="JPEG", quality=95)


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # no links on this file system
        with atomic_path(path) as aside:
            shutil.copyfile(source, aside)
