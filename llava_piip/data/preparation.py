"""Bringing a published data set into its layout: download if asked, unpack, and give images their expected names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from piip_core.archives import download, unpack_images
from piip_core.errors import UserError

from .audit import audit
from .audit_report import AuditReport
from .expected_names import NameRepair, provide_expected_names
from .published import ImageFolder, PublishedSet
from .records import read_records

__all__ = ["Preparation", "prepare_published"]

# The only folder whose files are published under other names than the annotation file uses
_RENAMED = "ocr_vqa"


@dataclass
class Preparation:
    """What was done for a data set and what it still lacks.

    Attributes:
        done: What was done, for people.
        sources: What is missing -> where to get it and where to put it.
        names: What became of images under other names than expected; None if that was not looked at.
        report: The audit of annotation file and images, without reading these; None without the annotation file.
    """

    done: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    names: NameRepair | None = None
    report: AuditReport | None = None

    @property
    def complete(self) -> bool:
        """Whether every image of the annotation file is there."""
        if self.report is None or self.sources:
            return False
        return not any(summary.unusable_by_folder.total() for summary in self.report.files)


def prepare_published(
    dataset: PublishedSet,
    root: str | os.PathLike[str],
    *,
    archives: Mapping[str, str | os.PathLike[str]] | None = None,
    fetch: bool = False,
    convert: bool = False,
    follow_links: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Preparation:
    """Prepares a published data set as far as its files are there; repeated, it goes on where it stopped.

    Args:
        dataset: The data set.
        root: Folder that holds all data sets.
        archives: Part -> its archive, where that is not at its usual place.
        fetch: Download what is missing.
        convert: Write JPEGs where the annotation file expects them; otherwise files get a second name.
        follow_links: Whether links below `root` may lead out of it.
        workers: Number of processes that look for the images.
        progress: Show progress bars.

    Raises:
        UserError: If an archive is damaged or unsafe, a download fails, or a part is unknown.
    """
    root, archives, preparation = Path(root), dict(archives or {}), Preparation()
    parts = [folder.part for folder in dataset.folders]
    if unknown := sorted(set(archives) - set(parts)):
        raise UserError(f"archive for {', '.join(unknown)}: {dataset.title} consists of {', '.join(parts)}")
    annotations = root / dataset.annotations
    if fetch:
        download(dataset.url, annotations, progress=progress)
    if not annotations.is_file():
        preparation.sources[dataset.annotations] = f"{dataset.url} -> {annotations}"
    for folder in dataset.folders:
        _prepare_folder(preparation, folder, root, archives.get(folder.part), fetch, progress)
    image_root = root / dataset.image_root
    if annotations.is_file() and image_root.is_dir():
        _repair_names(preparation, dataset, annotations, image_root, convert, follow_links, progress)
        preparation.report = audit(
            annotations,
            image_root,
            decode="none",
            published=dataset,
            workers=workers,
            follow_links=follow_links,
            progress=progress,
        )
    return preparation


def _prepare_folder(
    preparation: Preparation,
    folder: ImageFolder,
    root: Path,
    given: str | os.PathLike[str] | None,
    fetch: bool,
    progress: bool,
) -> None:
    """Unpacks one archive if it is there, or notes where to get it."""
    archive, target = Path(given or root / folder.archive), root / folder.folder
    there = target.is_dir() and any(target.iterdir())
    if given is None and fetch and not there:
        download(folder.url, archive, progress=progress)
    if given is not None or archive.is_file():
        done = unpack_images(archive, target, progress=progress)
        preparation.done.append(f"{archive}: {done.written} files unpacked into {target}, {done.present} were there")
    elif not there:
        note = f" ({folder.note})" if folder.note else ""
        preparation.sources[folder.folder] = f"{folder.url}{note} -> {archive}, or --archive {folder.part}=FILE"


def _repair_names(
    preparation: Preparation,
    dataset: PublishedSet,
    annotations: Path,
    image_root: Path,
    convert: bool,
    follow_links: bool,
    progress: bool,
) -> None:
    """Gives OCR-VQA's images the names that the tuning set expects."""
    renamed = [folder for folder in dataset.folders if folder.part == _RENAMED]
    if not renamed or not (image_root / renamed[0].folder).is_dir():
        return
    folder = PurePosixPath(renamed[0].folder)
    names = [
        image
        for record in read_records(annotations)
        for image in record.images
        if PurePosixPath(image).parent == folder
    ]
    preparation.names = provide_expected_names(
        names, image_root, convert=convert, follow_links=follow_links, progress=progress
    )
