"""ImageNet-1K (ILSVRC2012): unpacking the official archives into a folder per class, and checking every file."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive
from tqdm import tqdm

from piip_core.archives import ArchiveError, check_space
from piip_core.files import publish_folder

from ..audit import Audit
from ..dataset import DatasetError
from .audit import audit_classes

__all__ = ["FOLDER", "IMAGENET", "Split", "audit_imagenet", "prepare_imagenet"]

FOLDER = "imagenet"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_ADVICE = "Archives are given out at https://image-net.org/download to those who accept its terms"


@dataclass(frozen=True)
class Split:
    """A part of the data set: name of its folder, its archive, and the numbers of its classes and images."""

    name: str
    archive: str
    classes: int
    images: int


IMAGENET = (
    Split("train", "ILSVRC2012_img_train.tar", 1000, 1_281_167),
    Split("val", "ILSVRC2012_img_val.tar", 1000, 50_000),
)


def prepare_imagenet(
    root: str | os.PathLike[str],
    *,
    archives: str | os.PathLike[str] | None = None,
    splits: Sequence[Split] = IMAGENET,
) -> dict[str, int]:
    """Unpacks the official archives to `imagenet/train` and `imagenet/val`, each with a folder per class.

    A class of the training set appears when it is complete, the validation set when all of it is; repeated, it goes on
    where it stopped. The archives stay.

    Args:
        root: Folder that holds all data sets.
        archives: Folder of the archives; None for `root`.
        splits: What the data set consists of: training and validation set.

    Returns:
        Number of the images of each part that were unpacked; 0 if all were there.

    Raises:
        DatasetError: If an archive is missing, or is not this data set.
        ArchiveError: If one is damaged or unsafe, or the disk is full.
    """
    target, source = Path(root, FOLDER), Path(archives or root)
    train, val = splits
    done = dict.fromkeys((split.name for split in splits), 0)
    needed = [] if _is_complete(target / train.name, train) else [train.archive]
    needed += [] if _is_complete(target / val.name, val) else [val.archive, DEVKIT]
    missing = [name for name in needed if not (source / name).is_file()]
    if missing:
        raise DatasetError(f"{source}: has no {', '.join(missing)}. {_ADVICE}; --archives DIR says where they are")
    if train.archive in needed:
        done[train.name] = _unpack_train(source / train.archive, target / train.name, train)
    if val.archive in needed:
        labels = _validation_classes(source / DEVKIT, val)
        done[val.name] = _unpack_val(source / val.archive, target / val.name, labels)
    return done


def audit_imagenet(
    root: str | os.PathLike[str],
    *,
    decode: bool = True,
    workers: int | None = None,
    splits: Sequence[Split] = IMAGENET,
) -> Audit:
    """Counts, and with `decode` reads, the images below `root`, the folder of all data sets; see `audit_classes`."""
    parts = [(split.name, str(Path(root, FOLDER, split.name)), split.classes, split.images) for split in splits]
    return audit_classes(parts, decode=decode, workers=workers)


def _is_complete(folder: Path, split: Split) -> bool:
    """Whether all classes are there, each of which appeared when it was complete."""
    return folder.is_dir() and sum(not entry.name.startswith(".") for entry in os.scandir(folder)) == split.classes


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Opens a tar archive to be read from its beginning to its end; errors name it."""
    try:
        with tarfile.open(archive, "r:") as opened:
            yield opened
    except (tarfile.TarError, EOFError) as error:
        raise ArchiveError(
            f"{archive}: not a complete tar archive ({error}; {archive.stat().st_size} bytes): continue or repeat its "
            "download"
        ) from error


def _members(opened: tarfile.TarFile, archive: Path, ending: str) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Files of an archive that has nothing but files of one kind in it, with their names."""
    for info in opened:
        if info.isdir():
            continue
        name = PurePosixPath(info.name).name
        if not info.isfile() or info.name.removeprefix("./") != name or not name.endswith(ending):
            raise ArchiveError(
                f"{archive}: entry {info.name!r}: expected only files named as *{ending}, and no folders or links. "
                "Is it the official archive?"
            )
        yield info, name


def _unpack_train(archive: Path, folder: Path, split: Split) -> int:
    """The training archive holds an archive per class, named as the class."""
    folder.mkdir(parents=True, exist_ok=True)
    images, classes = 0, 0
    with _opened(archive) as opened, _bar(archive) as bar:
        for info, name in _members(opened, archive, ".tar"):
            classes += 1
            of_class = folder / name.removesuffix(".tar")
            if not of_class.exists():
                check_space(folder, archive, info.size)
                images += _unpack_class(archive, opened.extractfile(info), of_class, name)
            bar.update(info.size)
    if classes != split.classes:
        raise DatasetError(
            f"{archive}: {classes} classes: expected {split.classes}. Is the download complete? Those that are there "
            f"were unpacked to {folder}; a repeated command adds the others"
        )
    return images


def _unpack_class(archive: Path, content: object, folder: Path, name: str) -> int:
    images = 0
    with publish_folder(folder, durable=False) as aside:
        try:
            with tarfile.open(fileobj=content, mode="r:") as inner:
                for info, file_name in _members(inner, archive, ".JPEG"):
                    _write(inner, info, aside / file_name)
                    images += 1
        except (tarfile.TarError, EOFError) as error:
            raise ArchiveError(f"{archive}: {name} in it is damaged ({error}): download it again") from error
        if not images:
            raise ArchiveError(f"{archive}: {name} in it holds no images: download it again")
        os.sync()  # the new name must not be on the disk before the files are; once, not for each of a million
    return images


def _unpack_val(archive: Path, folder: Path, labels: dict[str, str]) -> int:
    """The validation archive holds the images side by side, named by numbers."""
    if folder.is_dir() and any(folder.iterdir()):
        raise DatasetError(f"{folder}: holds something else than the validation set: expected no such folder; move it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, archive, archive.stat().st_size)
    with publish_folder(folder, durable=False) as aside:
        for name in set(labels.values()):
            (aside / name).mkdir()
        written = set()
        with _opened(archive) as opened, _bar(archive) as bar:
            for info, name in _members(opened, archive, ".JPEG"):
                if name not in labels:
                    raise DatasetError(f"{archive}: {name}: expected the names of ILSVRC2012's validation images")
                _write(opened, info, aside / labels[name] / name)
                written.add(name)
                bar.update(info.size)
        if len(written) != len(labels):
            raise DatasetError(f"{archive}: {len(written)} images: expected {len(labels)}. Is the download complete?")
        os.sync()
    return len(written)


def _write(opened: tarfile.TarFile, info: tarfile.TarInfo, path: Path) -> None:
    with opened.extractfile(info) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file)
    if path.stat().st_size != info.size:
        raise tarfile.ReadError(f"{info.name} ends early")


def _bar(archive: Path) -> tqdm:
    total = archive.stat().st_size
    return tqdm(total=total, desc=f"Unpacking {archive.name}", unit="B", unit_scale=True, disable=None)


def _validation_classes(devkit: Path, split: Split) -> dict[str, str]:
    """Class folder of every validation image, from the development kit."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            parse_devkit_archive(folder, str(devkit.resolve()))
        except RuntimeError as error:  # of torchvision, for another checksum
            raise ArchiveError(f"{devkit}: is damaged, or is not ILSVRC2012's: download it again") from error
        names = load_meta_file(folder)[1]
    if len(names) != split.images:
        raise DatasetError(f"{devkit}: classes of {len(names)} validation images: expected {split.images}")
    return {f"ILSVRC2012_val_{number:08d}.JPEG": name for number, name in enumerate(names, 1)}
