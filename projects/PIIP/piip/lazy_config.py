"""Loading LazyConfigs for the command-line tools, with the mistakes caught that would otherwise pass in silence."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from piip.data import Category, DatasetError, coco_categories
from piip.data.classification import folder_categories, get_train_dicts
from piip.data.dataset import check_same_classes, existing_folder
from piip.data.label_maps import label_classes
from piip.setting_types import convert, leave_unchecked, setting_kinds
from piip_core.errors import ConfigError

logger = logging.getLogger(__name__)

# Kinds of data sets, and the setting that says where one is
_KINDS = {"coco": "annotations", "label_maps": "labels", "class_folders": "images"}


def load_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Loads a LazyConfig of Python or YAML, and applies overrides, which must name what exists and have its type.

    Overrides are such as "train.max_iter=100"; "+a.b=1" adds a key.

    Raises:
        ConfigError: If the file does not exist, or an override cannot be parsed, names no existing key or has a value
            of another type.
    """
    if not os.path.isfile(config_file):
        raise ConfigError(f"--config-file {config_file!r}: no such file (looked from {os.getcwd()})")
    if not config_file.endswith((".py", ".yaml", ".yml")):
        raise ConfigError(f"--config-file {config_file!r}: expected a LazyConfig (.py or .yaml)")
    leave_unchecked()
    cfg = LazyConfig.load(config_file)
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"override {text!r}: expected key=value; quote values with special characters twice, "
                f"as in 'key=\"a (b)\"' ({str(error).splitlines()[0]})"
            ) from error
        if override.is_delete() or override.package or override.is_sweep_override():
            raise ConfigError(
                f"override {text!r}: expected key=value with one value; quote text with commas twice, as in "
                "'key=\"a,b\"', write key=null for none"
            )
        adds = override.is_add() or override.is_force_add()
        written = text.partition("=")[2].strip()
        try:
            _set(cfg, override.key_or_group, override.value(), text, adds, written)
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {text!r}: {str(error).splitlines()[0]}") from error
    return cfg


def _set(cfg: DictConfig, key: str, value: Any, override: str, adds: bool, written: str | None = None) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _set(cfg, f"{key}.{name}", inner, override, adds)
        return
    if not adds:
        _check_exists(cfg, key, override)
    kinds = setting_kinds(cfg, key)
    if isinstance(value, str) and "${" in value:
        OmegaConf.update(cfg, key, value)
        convert(OmegaConf.select(cfg, key), kinds, None, key, written)
    else:
        OmegaConf.update(cfg, key, convert(value, kinds, OmegaConf.select(cfg, key), key, written))


def _check_exists(cfg: DictConfig, key: str, override: str) -> None:
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    if isinstance(parent, ListConfig):
        if name.isdecimal() and int(name) < len(parent):
            return
        raise ConfigError(
            f"override {override!r}: {parent_key} is a list of {len(parent)}: expected an index below that"
        )
    if not isinstance(parent, DictConfig):
        raise ConfigError(f"override {override!r}: the configuration has no {parent_key!r}{_nearest(key, cfg)}")
    if name in parent:
        return
    if "_target_" in parent:  # an argument that has a default
        target = locate(parent._target_) if isinstance(parent._target_, str) else parent._target_
        if name in inspect.signature(target).parameters:
            return
    where = parent_key or "the configuration"
    raise ConfigError(f"override {override!r}: {where} has no {name!r}{_nearest(name, parent)} (+{override} adds it)")


def _nearest(key: str, known: DictConfig) -> str:
    name = key.split(".")[0]
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != name else ""


def check_device(device: str) -> torch.device:
    """The device of `train.device`.

    Raises:
        ConfigError: If it is no device, or a CUDA device and none is visible.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"train.device={device}: expected cpu, cuda or cuda:N ({error})") from None
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device={device}: no CUDA device is visible; use train.device=cpu")
    return torch.device(device)


def data_kind(cfg: DictConfig) -> str | None:
    """What the data are, as `data.kind` says: "coco", "label_maps" or "class_folders"; None for data of others.

    Raises:
        ConfigError: If it is anything else.
    """
    kind = cfg.get("data", {}).get("kind")
    if kind not in (None, *_KINDS):
        raise ConfigError(f"data.kind={kind}: expected one of {', '.join(_KINDS)}")
    return kind


def training_size(cfg: DictConfig) -> tuple[int, int]:
    """Height and width of the largest (landscape) image that `cfg.data.train` makes, before padding.

    Raises:
        ConfigError: If the configuration does not say.
    """
    kind, data = data_kind(cfg), cfg.get("data", {})
    if kind == "class_folders":
        return data.image_size, data.image_size
    train = data.get("train", {})
    if kind == "label_maps":
        return tuple(train.crop)
    if "crop" in train:  # multi-scale training
        return train.crop, train.crop
    if "scales" not in train:
        raise ConfigError(
            "the configuration has none of data.image_size, data.train.crop and data.train.scales: give --input H W"
        )
    sides = max(train.scales, key=lambda scale: scale[0] * scale[1])
    return min(sides), max(sides)


def has_test_set(cfg: DictConfig) -> bool:
    """Whether there is something to evaluate on: data of others, or a test set that is not null.

    For folders of classes, a `data.test.share` that is not 0 will do.
    """
    kind, test = data_kind(cfg), cfg.get("data", {}).get("test", {})
    return kind is None or test.get(_KINDS[kind]) is not None or bool(test.get("share"))


def check_folders(cfg: DictConfig, *, training: bool) -> None:
    """Raises DatasetError if a folder of images or label maps is missing that training or test will read."""
    if data_kind(cfg) not in ("coco", "label_maps"):  # folders of classes are read for their classes
        return
    parts = [cfg.data.train] if training else []
    parts += [cfg.data.test] if has_test_set(cfg) else []
    for part in parts:
        for setting in ("images", "labels"):
            if setting in part:
                existing_folder(part[setting], f"a folder of {setting}", setting)


def follow_annotations(cfg: DictConfig, *, training: bool) -> tuple[Category, ...]:
    """Sets `data.num_classes`, which the model's fields refer to, from annotation files, label maps or folders.

    For folders of classes, also `data.train.num_images`, which the length of the training follows. Without `training`,
    the test set alone is asked.

    Returns:
        The classes, or nothing for a configuration without `data.kind`.

    Raises:
        DatasetError: If a file cannot be used, or training and test set have different classes.
    """
    kind = data_kind(cfg)
    if kind is None:
        return ()
    if kind == "label_maps":
        classes = label_classes(cfg.data.classes, cfg.data.get("reduce_zero_label"))
        logger.info("Values in the label maps: %s", classes.meaning)
        source, categories = str(cfg.data.classes), classes.categories
    else:
        source, categories = _stored_categories(cfg, kind, training)
    cfg.data.num_classes = len(categories)
    names = ", ".join(category.name for category in categories[:10]) + (" ..." if len(categories) > 10 else "")
    logger.info("%d classes from %s: %s", len(categories), source, names)
    return categories


def _stored_categories(cfg: DictConfig, kind: str, training: bool) -> tuple[str, tuple[Category, ...]]:
    """An annotation file or folder of classes and its categories, which are those of the others, too."""
    train, test, setting = cfg.data.train, cfg.data.test, _KINDS[kind]
    share = test.get("share") or 0.0
    sources = [train[setting]] if training or share else []
    if test[setting] is not None and not share:
        sources.append(test[setting])
    if not sources:
        raise DatasetError(f"data.test.{setting} is null: expected a data set to evaluate on")
    read = coco_categories if kind == "coco" else folder_categories
    categories = [read(source) for source in sources]
    check_same_classes(sources[0], categories[0], sources[-1], categories[-1])
    if training and "num_images" in train:
        train.num_images = len(get_train_dicts(train.images, share=share))
        batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size", default=1)
        if train.num_images < batch:
            logger.warning(
                "%s: %d training images, fewer than dataloader.train.total_batch_size=%d: an epoch is one iteration",
                train.images,
                train.num_images,
                batch,
            )
    return sources[0], categories[0]


def skip_pretrained(cfg: DictConfig) -> None:
    """Sets `train.load_pretrained`, which the model's fields refer to, to False: a checkpoint of all of it follows."""
    if "load_pretrained" in cfg.get("train", {}):
        cfg.train.load_pretrained = False
