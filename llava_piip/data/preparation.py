"""Bringing a published data set into its layout: download if asked, unpack, and give images their expected names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from piip_core.archives import download, unpack_images
from piip_core.errors import UserError
from piip_core.files import atomic_path

from .images import ImageFolder, same_stem
from .published import PublishedFolder, PublishedSet
from .records import AnyPath, DataError, read_records

# The only folder whose files are published under other names than the annotation file uses
_RENAMED = "ocr_vqa"


@dataclass
class Preparation:
    """What was done for a data set and what it still lacks."""

    done: list[str] = field(default_factory=list)  # what was unpacked, for people
    sources: dict[str, str] = field(default_factory=dict)  # what is missing -> where to get it and where to put it
    renamed: dict[str, str] = field(default_factory=dict)  # image -> the file that now also has its name


def prepare_published(
    dataset: PublishedSet,
    root: AnyPath,
    *,
    archives: Mapping[str, AnyPath] | None = None,
    fetch: bool = False,
    follow_links: bool = False,
) -> Preparation:
    """Lays out a published data set as far as its files are there; what is done already is not done again.

    Args:
        dataset: The data set.
        root: Folder that holds all data sets.
        archives: Name of a part -> its archive, where that is not at its usual place.
        fetch: Download what is missing.
        follow_links: Whether links below `root` may lead out of it.

    Raises:
        UserError: If an archive is damaged or unsafe, a download fails, or a part is unknown.
    """
    root, archives, preparation = Path(root), dict(archives or {}), Preparation()
    parts = [folder.part for folder in dataset.folders]
    if unknown := sorted(set(archives) - set(parts)):
        raise UserError(f"archive for {', '.join(unknown)}: {dataset.title} consists of {', '.join(parts)}")
    annotations, images = root / dataset.annotations, root / dataset.image_root
    if fetch:
        download(dataset.url, annotations)
    if not annotations.is_file():
        preparation.sources[dataset.annotations] = f"{dataset.url} -> {annotations}"
    for folder in dataset.folders:
        _prepare_folder(preparation, folder, root, archives.get(folder.part), fetch)
        if folder.part == _RENAMED and annotations.is_file() and (root / folder.folder).is_dir():
            names = (image for record in read_records(annotations) for image in record.images)
            there = [name for name in names if (images / name).parent == root / folder.folder]
            preparation.renamed = provide_expected_names(there, ImageFolder(images, follow_links=follow_links))
    return preparation


def _prepare_folder(
    preparation: Preparation, folder: PublishedFolder, root: Path, given: AnyPath | None, fetch: bool
) -> None:
    """Unpacks one archive if it is there, or notes where to get it."""
    archive, target = Path(given or root / folder.archive), root / folder.folder
    there = target.is_dir() and any(target.iterdir())
    if given is None and fetch and not there:
        download(folder.url, archive)
    if given is not None or archive.is_file():
        done = unpack_images(archive, target)
        preparation.done.append(f"{archive}: {done.written} files unpacked into {target}, {done.present} were there")
    elif not there:
        note = f" ({folder.note})" if folder.note else ""
        preparation.sources[folder.folder] = f"{folder.url}{note} -> {archive}, or --archive {folder.part}=FILE"


def provide_expected_names(names: Iterable[str], images: ImageFolder) -> dict[str, str]:
    """Makes images available under expected names when they lie beside them with another ending, and says which file.

    The tuning set names every OCR-VQA image `.jpg`; the download script keeps the endings of the addresses, so that
    some lie there as `.gif` or `.png`. They stay as they are: the expected name becomes a hard link (on file systems
    without links a copy), which keeps the pixels; the ending does not matter for reading.
    """
    provided = {}
    for name in tqdm(list(dict.fromkeys(names)), "Names", unit=" images", disable=None):
        path = images.root / name
        for other in () if path.is_file() and path.stat().st_size else same_stem(path):
            source = str(PurePosixPath(name).with_name(other.name))
            try:
                images.open(source)
            except DataError:  # the next may be one
                continue
            _link(images.locate(source), path)
            provided[name] = source
            break
    return provided


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # no links on this file system, or an empty file in the way
        with atomic_path(path) as aside:
            shutil.copyfile(source, aside)
