"""Puts the facts of a published row (`piip_core.zoo`) into the parts of a LazyConfig."""

from __future__ import annotations

from omegaconf import DictConfig

from piip.lazy import lazy_dataclass
from piip_core.zoo import ZooEntry

__all__ = ["apply_row"]


def apply_row(row: ZooEntry, *, model: DictConfig, data: DictConfig, optimizer: DictConfig) -> None:
    """Sets backbone, padding, normalisation, image scale and layer decay of a published model, in place.

    Args:
        row: From `piip_core.zoo.get(NAME)`.
        model: A detector of `configs/common`, with a PIIP backbone below its FPN.
        data: The `data` node of `configs/common/coco.py`.
        optimizer: The optimizer of `configs/common/schedule_1x.py`.
    """
    model.backbone.bottom_up.config = lazy_dataclass(row.config)
    model.backbone.bottom_up.pad_divisor = row.pad_divisor
    model.pixel_mean = list(row.pixel_mean)
    model.pixel_std = list(row.pixel_std)
    data.train.scales = [[row.long_side, row.short_side]]  # also the test scale
    optimizer.lr = row.learning_rate
    optimizer.weight_decay = row.weight_decay
    optimizer.params.decay_rate = row.layer_decay
