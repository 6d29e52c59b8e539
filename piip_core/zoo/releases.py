"""Released models: which file or repository of the Hugging Face hub each of them is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import ClassifierConfig, PIIPConfig
from . import classification, dense, multimodal
from .entry import ClassificationEntry, MultimodalEntry, ZooEntry
from .pyramids import tsbl_as_released

_METRICS = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU", "top1": "top-1", "average": "mean of eight"}


_Entry = ZooEntry | ClassificationEntry | MultimodalEntry


@dataclass(frozen=True, kw_only=True)
class Released:
    """A model whose weights its authors give out.

    Args:
        entry: The model.
        repository: Repository of the hub.
        file: The checkpoint in it; None where the whole repository is the model.
        revision: Branch or commit. A branch is followed at the first download only, see `fetch_released`.
        size: Bytes of the file, where they are known beforehand.
        sha256: Of the file, where it is known beforehand.
    """

    entry: _Entry
    repository: str
    file: str | None = None
    revision: str = "main"
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What commands take; of detectors and segmentors also the name of their entry."""
        entry = self.entry
        return f"{entry.head}_{entry.backbone or entry.name}" if isinstance(entry, ZooEntry) else entry.name

    @property
    def config(self) -> PIIPConfig | ClassifierConfig:
        """What the file holds: as published, and of four branches what the public code builds."""
        config = self.entry.vision if isinstance(self.entry, MultimodalEntry) else self.entry.config
        return tsbl_as_released(config) if isinstance(config, PIIPConfig) and len(config.branches) == 4 else config

    @property
    def data(self) -> str:
        """What it was trained and evaluated on."""
        return "LLaVA" if isinstance(self.entry, MultimodalEntry) else self.entry.config_file.partition("/")[0]

    @property
    def metrics(self) -> dict[str, float]:
        """Published numbers of accuracy by their name; those of the public repository, which gives out the file."""
        entry = self.entry
        numbers: dict[str, Any] = asdict(entry.scores if isinstance(entry, MultimodalEntry) else entry.published)
        return {label: numbers[key] for key, label in _METRICS.items() if numbers.get(key) is not None}

    @property
    def url(self) -> str:
        """Address of the file or repository."""
        inside = f"/resolve/{self.revision}/{self.file}" if self.file else ""
        return f"https://huggingface.co/{self.repository}{inside}"


# Names of zoo entries; files of OpenGVLab/PIIP without ".pth"
_FILES = {
    "vit_b_1024": "detection/mask_rcnn_deit_vit_b_fpn_1x_coco_bs16",
    "piip_tsb_1120_896_448": "detection/mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16",
    "piip_tsb_1568_896_448": "detection/mask_rcnn_deit_tsb_1568_896_448_fpn_1x_coco_bs16",
    "piip_tsb_1568_1120_672": "detection/mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16",
    "vit_l_1024": "detection/mask_rcnn_deit_vit_l_fpn_1x_coco_bs16",
    "piip_sbl_1120_672_448": "detection/mask_rcnn_deit_sbl_1120_672_448_fpn_1x_coco_bs16",
    "piip_sbl_1344_896_448": "detection/mask_rcnn_deit_sbl_1344_896_448_fpn_1x_coco_bs16",
    "piip_sbl_1568_896_672": "detection/mask_rcnn_deit_sbl_1568_896_672_fpn_1x_coco_bs16",
    "piip_sbl_1568_1120_672": "detection/mask_rcnn_deit_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "piip_tsbl_1344_896_672_448": "detection/mask_rcnn_deit_tsbl_1344_896_672_448_fpn_1x_coco_bs16",
    "piip_tsbl_1568_1120_672_448": "detection/mask_rcnn_deit_tsbl_1568_1120_672_448_fpn_1x_coco_bs16",
    "piip_tsbl_1792_1568_1120_448": "detection/mask_rcnn_deit_tsbl_1792_1568_1120_448_fpn_1x_coco_bs16",
    "internvit_6b_1024": "detection/mask_rcnn_internvit_6b_fpn_1x_coco_bs16_ms",
    "piip_h6b_1024_512": "detection/mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms",
    "piip_sbl_augreg384_1568_1120_672": "detection/mask_rcnn_augreg_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "piip_sbl_uniperceiver_1568_1120_672": "detection/mask_rcnn_uniperceiver_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "piip_sbl_mae_1568_1120_672": "detection/mask_rcnn_mae_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "piip_sbl_dinov2_1568_1120_672": "detection/mask_rcnn_dinov2_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "piip_sbl_beitv2_1568_1120_672": "detection/mask_rcnn_beit_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "piip_ct_cs_cb_1024_672_448": "detection/mask_rcnn_convnext-tsb_1024_672_448_regular-fpn",
    "piip_sbl_1792_1120_672_dino": "detection/dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms",
    "piip_h6b_1024_768_dino": "detection/dino_4scale_internvit_h6b_1024_768_fpn_1x_coco_bs32_ms",
    "internvit_6b_512_upernet": "segmentation/upernet_internvit_6b_512_80k_ade20k_bs16_lr4e-5",
    "piip_h6b_512_192_upernet": "segmentation/upernet_internvit_h6b_192_512_80k_ade20k_bs16_lr4e-5",
    "piip_h6b_512_256_upernet": "segmentation/upernet_internvit_h6b_256_512_80k_ade20k_bs16_lr4e-5",
    "piip_h6b_512_384_upernet": "segmentation/upernet_internvit_h6b_384_512_80k_ade20k_bs16_lr4e-5",
    "piip_h6b_512_512_upernet": "segmentation/upernet_internvit_h6b_512_512_80k_ade20k_bs16_lr4e-5",
    "piip_tsb_368_192_128": "classification/piip_3branch_tsb_368-192-128_cls_token_deit1",
    "piip_sbl_320_160_96": "classification/piip_3branch_sbl_320-160-96_cls_token_augreg",
    "piip_sbl_384_192_128": "classification/piip_3branch_sbl_384-192-128_cls_token_augreg",
}
# Repositories of OpenGVLab, by the names of their zoo entries, which have one form of the same letters
_CHAT_MODELS = (
    "PIIP-LLaVA_CLIP-BL_512-256_7B",
    "PIIP-LLaVA_ConvNeXt-B_CLIP-L_640-224_7B",
    "PIIP-LLaVA_CLIP-BL_512-448_7B",
    "PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B",
    "PIIP-LLaVA_ConvNeXt-L_CLIP-L_1024-336_7B",
    "PIIP-LLaVA-Plus_ConvNeXt-L_CLIP-L_1024-336_7B",
    "PIIP-LLaVA_CLIP-BL_512-448_13B",
    "PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_13B",
    "PIIP-LLaVA_ConvNeXt-L_CLIP-L_1024-336_13B",
)


def _all() -> tuple[Released, ...]:
    known: tuple[_Entry, ...] = (*dense.ENTRIES, *classification.ENTRIES, *multimodal.ENTRIES)
    entries = {entry.name: entry for entry in known}
    files = [
        Released(entry=entries[name], repository="OpenGVLab/PIIP", file=f"{file}.pth") for name, file in _FILES.items()
    ]
    names = {repository.replace("-", "_").lower(): repository for repository in _CHAT_MODELS}
    chats = [Released(entry=entries[name], repository=f"OpenGVLab/{names[name]}") for name in names]
    return (*files, *chats)


RELEASED = _all()
"""All of them, in the order of the published tables."""
