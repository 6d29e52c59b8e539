"""ADE20K (SceneParse150): unpacking it into its layout, and checking every file of it."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from piip_core.archives import ArchiveError, Unpacked, download, unpack_images

from ..audit import Audit
from ..dataset import DatasetError
from .audit import audit_label_maps
from .classes import label_classes

__all__ = ["ADE20K", "FOLDER", "Split", "audit_ade20k", "prepare_ade20k"]

FOLDER = "ADEChallengeData2016"
URL = f"http://data.csail.mit.edu/places/ADEchallenge/{FOLDER}.zip"


@dataclass(frozen=True)
class Split:
    """A part of the data set: its name, as its folders are called, and the number of its images."""

    name: str
    images: int

    def folders(self, root: str | os.PathLike[str]) -> tuple[str, str]:
        """Folders of images and of label maps, below the folder of the data set."""
        return tuple(str(Path(root, kind, self.name)) for kind in ("images", "annotations"))


ADE20K = (Split("training", 20_210), Split("validation", 2_000))


def prepare_ade20k(
    root: str | os.PathLike[str],
    *,
    archive: str | os.PathLike[str] | None = None,
    fetch: bool = False,
    splits: Sequence[Split] = ADE20K,
) -> Unpacked | None:
    """Unpacks the published archive below `root`, the folder that holds all data sets; repeated, it goes on.

    Args:
        root: See above.
        archive: The archive, if it is not `ADEChallengeData2016.zip` in `root`.
        fetch: Download the archive if it is not there.
        splits: What the data set consists of.

    Returns:
        Numbers of files, or None if nothing was to be done.

    Raises:
        DatasetError: If there is no archive, or it is not this data set; nothing is unpacked then.
        UserError: If the archive is damaged or unsafe, or the download fails.
    """
    target = Path(root, FOLDER)
    if archive is None and _is_complete(target, splits):
        return None
    given, archive = archive, Path(archive or Path(root, f"{FOLDER}.zip"))
    if not archive.is_file():
        if given is not None or not fetch:
            raise DatasetError(f"{archive}: no such file. Download {URL}, or add --download; --archive FILE names it")
        download(URL, archive)
    _check_content(archive, splits)
    return unpack_images(archive, target)


def audit_ade20k(
    root: str | os.PathLike[str],
    *,
    workers: int | None = None,
    splits: Sequence[Split] = ADE20K,
) -> Audit:
    """Reads every file below `root`, the folder that holds all data sets; see `audit_label_maps`."""
    classes, target = label_classes("ade20k"), Path(root, FOLDER)
    return Audit(
        [
            audit_label_maps(
                *split.folders(target),
                classes,
                title=split.name,
                expected=split.images,
                workers=workers,
            )
            for split in splits
        ]
    )


def _is_complete(target: Path, splits: Sequence[Split]) -> bool:
    folders = [(folder, split.images) for split in splits for folder in split.folders(target)]
    return all(os.path.isdir(folder) and len(os.listdir(folder)) == number for folder, number in folders)


def _check_content(archive: Path, splits: Sequence[Split]) -> None:
    """Compares the numbers of files in the archive with the published ones."""
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [PurePosixPath(info.filename) for info in opened.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ArchiveError(
            f"{archive}: not a complete zip archive ({error}; {archive.stat().st_size} bytes): continue or repeat its "
            "download"
        ) from error
    found = Counter(str(path.parent) for path in entries if not path.name.startswith("."))
    for split in splits:
        for folder in split.folders(FOLDER):
            if found[folder] != split.images:
                raise DatasetError(
                    f"{archive}: {found[folder]} files in {folder}: expected the published {split.images}. Is it "
                    f"{FOLDER}.zip ({URL})? Nothing was unpacked"
                )
