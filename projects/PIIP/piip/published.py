"""Checkpoints of released classifiers, which read other tokens than the configurations for new trainings say."""

from __future__ import annotations

import os

from detectron2.config import instantiate
from omegaconf import DictConfig

from piip.lazy import lazy_dataclass
from piip.lazy_config import data_kind
from piip_core.checkpoints import PublishedNames, read_checkpoint
from piip_core.config import ClassifierConfig
from piip_core.errors import ConfigError

__all__ = ["follow_published"]


def follow_published(cfg: DictConfig, weights: str) -> None:
    """Sets `model.config` of a classifier to what the checkpoint holds, if `tools/convert_checkpoint.py` wrote it.

    Configurations of other models are left alone; checkpoints of trainings do not describe the model and change
    nothing.

    Raises:
        CheckpointError: If the file cannot be read.
        ConfigError: If it is a classifier with other image sizes than that of `cfg`.
    """
    if data_kind(cfg) != "class_folders" or "config" not in cfg.model or not os.path.exists(weights):
        return
    given, description = instantiate(cfg.model.config), read_checkpoint(weights).description or {}
    held = PublishedNames.from_dict(description).config if "config" in description else None
    if not isinstance(given, ClassifierConfig) or not isinstance(held, ClassifierConfig):
        return
    sizes = [[branch.image_size for branch in config.pyramid.branches] for config in (held, given)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{weights}: a classifier with images of {sizes[0]} pixels, the configuration has one with {sizes[1]}: "
            "expected the same; give the --config-file of the checkpoint's model"
        )
    cfg.model.config = lazy_dataclass(held)
    cfg.model.config.num_classes = "${data.num_classes}"
    cfg.data.num_classes = held.num_classes
