"""The published data sets: their sizes, where their files lie, and where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["PUBLISHED", "PublishedFolder", "PublishedSet"]

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
