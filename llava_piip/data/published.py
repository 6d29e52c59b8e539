"""The published data sets: sizes, where their files lie, where to get them; and bringing them into their layout."""

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

from .images import ImageFolder
from .records import AnyPath, DataError, read_records

# The only folder whose files are published under other names than the annotation file uses
_RENAMED = "ocr_vqa"
_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")  # the likeliest first
_LLAVA = "https://huggingface.co/datasets/liuhaotian"


@dataclass(frozen=True)
class PublishedFolder:
    """A folder of images of a published data set. Paths are relative to the folder that holds all data sets."""

    part: str  # short name
    folder: str  # where its images belong
    url: str  # public address of the archive
    note: str = ""  # what to know about the source

    @property
    def archive(self) -> str:
        """Where its archive is looked for and downloaded to: beside the folder, under its public name."""
        return str(PurePosixPath(self.folder).with_name(PurePosixPath(self.url).name))


@dataclass(frozen=True)
class PublishedSet:
    """A published annotation file with its images. Paths are relative to the folder that holds all data sets."""

    title: str  # in the literature
    annotations: str
    url: str  # public address of the annotation file
    image_root: str  # that the image names in it are relative to
    records: int
    records_by_folder: Mapping[str, int]  # by the first folder of their image, "" for none; empty if not known
    folders: tuple[PublishedFolder, ...]


PUBLISHED: Mapping[str, PublishedSet] = {
    "pretrain": PublishedSet(
        title="LCS-558K",
        annotations="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        url=f"{_LLAVA}/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
        image_root="LLaVA-Pretrain/images",
        records=558_128,
        records_by_folder={},
        folders=(
            PublishedFolder("images", "LLaVA-Pretrain/images", f"{_LLAVA}/LLaVA-Pretrain/resolve/main/images.zip"),
        ),
    ),
    "finetune": PublishedSet(
        title="LLaVA-1.5 mix665k",
        annotations="llava_v1_5_mix665k.json",
        url=f"{_LLAVA}/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
        image_root=".",
        records=665_298,
        # as listed in LLaVA's issue 657; the sum is the number of records
        records_by_folder={
            "coco": 364_100,
            "gqa": 72_140,
            "ocr_vqa": 80_000,
            "textvqa": 21_953,
            "vg": 86_417,
            "": 40_688,
        },
        folders=(
            PublishedFolder(
                "coco",
                "coco/train2017",
                "http://images.cocodataset.org/zips/train2017.zip",
                "the same folder as for detection",
            ),
            PublishedFolder("gqa", "gqa/images", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
            PublishedFolder(
                "ocr_vqa",
                "ocr_vqa/images",
                "https://huggingface.co/datasets/weizhiwang/llava_v15_instruction_images/resolve/main/"
                "ocr_vqa_images_llava_v15.zip",
                "a copy by others, from LLaVA's pull request 1458: many addresses of the original script are dead",
            ),
            PublishedFolder(
                "textvqa",
                "textvqa/train_images",
                "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            ),
            PublishedFolder("vg1", "vg/VG_100K", "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip"),
            PublishedFolder("vg2", "vg/VG_100K_2", "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip"),
        ),
    ),
}


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
        for ending in () if path.is_file() and path.stat().st_size else (*_ENDINGS, *map(str.upper, _ENDINGS)):
            source = str(PurePosixPath(name).with_suffix(ending))
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
