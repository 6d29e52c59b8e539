"""The published data sets: their sizes, where their files lie, and where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["PUBLISHED", "ImageFolder", "PublishedSet"]


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images of a published data set. Paths are relative to the folder that holds all data sets.

    Attributes:
        part: Short name.
        folder: Where its images belong.
        archive: Where its archive is looked for and downloaded to.
        url: Public address of the archive.
        note: What to know about the source.
    """

    part: str
    folder: str
    archive: str
    url: str
    note: str = ""


@dataclass(frozen=True)
class PublishedSet:
    """A published annotation file with its images. Paths are relative to the folder that holds all data sets.

    Attributes:
        title: Name in the literature.
        annotations: The annotation file.
        url: Public address of the annotation file.
        image_root: Folder that the image names in it are relative to.
        records: Published number of records.
        records_by_folder: Published number of records by the first folder of their image, "" for none, where known.
        folders: The image folders.
    """

    title: str
    annotations: str
    url: str
    image_root: str
    records: int
    folders: tuple[ImageFolder, ...]
    records_by_folder: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


_LCS_558K = PublishedSet(
    title="LCS-558K",
    annotations="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    url="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
    image_root="LLaVA-Pretrain/images",
    records=558_128,
    folders=(
        ImageFolder(
            part="images",
            folder="LLaVA-Pretrain/images",
            archive="LLaVA-Pretrain/images.zip",
            url="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
        ),
    ),
)

_MIX_665K = PublishedSet(
    title="LLaVA-1.5 mix665k",
    annotations="llava_v1_5_mix665k.json",
    url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
    image_root=".",
    records=665_298,
    # as listed in LLaVA's issue 657; the sum is the number of records
    records_by_folder=MappingProxyType(
        {"coco": 364_100, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417, "": 40_688}
    ),
    folders=(
        ImageFolder(
            part="coco",
            folder="coco/train2017",
            archive="coco/train2017.zip",
            url="http://images.cocodataset.org/zips/train2017.zip",
            note="the same folder as for detection",
        ),
        ImageFolder(
            part="gqa",
            folder="gqa/images",
            archive="gqa/images.zip",
            url="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        ),
        ImageFolder(
            part="ocr_vqa",
            folder="ocr_vqa/images",
            archive="ocr_vqa/ocr_vqa_images_llava_v15.zip",
            url="https://huggingface.co/datasets/weizhiwang/llava_v15_instruction_images/resolve/main/"
            "ocr_vqa_images_llava_v15.zip",
            note="a copy by others, from LLaVA's pull request 1458: many addresses of the original script are dead",
        ),
        ImageFolder(
            part="textvqa",
            folder="textvqa/train_images",
            archive="textvqa/train_val_images.zip",
            url="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        ),
        ImageFolder(
            part="vg1",
            folder="vg/VG_100K",
            archive="vg/images.zip",
            url="https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
        ),
        ImageFolder(
            part="vg2",
            folder="vg/VG_100K_2",
            archive="vg/images2.zip",
            url="https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
        ),
    ),
)

PUBLISHED: Mapping[str, PublishedSet] = MappingProxyType({"pretrain": _LCS_558K, "finetune": _MIX_665K})
