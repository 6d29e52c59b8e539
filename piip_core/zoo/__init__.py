"""Published models by name: their configuration, the images they take, and the numbers published for them.

How they were trained stands in the Detectron2 configs, `projects/PIIP/configs`, which read the rest from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from ..errors import ConfigError
from . import beyond, families
from . import chat as _chat
from . import classification as _classifiers
from . import dense as _dense
from . import multimodal as _multimodal
from .entry import (
    ClassificationEntry,
    ClassificationNumbers,
    MultimodalEntry,
    MultimodalScores,
    PublishedNumbers,
    ZooEntry,
)
from .networks import VIT
from .pyramids import baseline, deit_pyramid, tsbl_as_released
from .releases import RELEASED as _RELEASED
from .releases import Released

__all__ = [
    "VIT",
    "ClassificationEntry",
    "ClassificationNumbers",
    "MultimodalEntry",
    "MultimodalScores",
    "PublishedNumbers",
    "Released",
    "ZooEntry",
    "baseline",
    "beyond",
    "chat_models",
    "classification",
    "classification_entries",
    "deit_pyramid",
    "entries",
    "families",
    "find",
    "get",
    "multimodal",
    "multimodal_entries",
    "names",
    "released",
    "released_models",
    "tsbl_as_released",
]

_BY_NAME = {entry.name: entry for entry in _dense.ENTRIES}
_CLASSIFIERS_BY_NAME = {entry.name: entry for entry in _classifiers.ENTRIES}
_MULTIMODAL_BY_NAME = {entry.name: entry for entry in (*_multimodal.ENTRIES, *_multimodal.SETTINGS)}
_RELEASED_BY_NAME = {name: model for model in _RELEASED for name in (model.entry.name, model.name)}
_Entry = TypeVar("_Entry")


def entries() -> tuple[ZooEntry, ...]:
    """All published dense models, in the order of the tables."""
    return _dense.ENTRIES


def names() -> list[str]:
    """Names of all published dense models, in the order of the tables."""
    return list(_BY_NAME)


def get(name: str) -> ZooEntry:
    """A published dense model by name, or one of `beyond`.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    return beyond.entry(name) if name in beyond.NAMES else _find(name, _BY_NAME)


def classification_entries() -> tuple[ClassificationEntry, ...]:
    """All published classifiers, in the order of the tables."""
    return _classifiers.ENTRIES


def classification(name: str) -> ClassificationEntry:
    """A published classifier by name.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    return _find(name, _CLASSIFIERS_BY_NAME)


def multimodal_entries() -> tuple[MultimodalEntry, ...]:
    """All published multimodal models, in the order of the table."""
    return _multimodal.ENTRIES


def chat_models() -> tuple[MultimodalEntry, ...]:
    """Multimodal models of today's encoders, which nobody published, around any language model."""
    return _chat.models()


def multimodal(name: str) -> MultimodalEntry:
    """A published multimodal model, a setting of `zoo.ablations` or one of `chat_models`, by name.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    if name in _MULTIMODAL_BY_NAME:
        return _MULTIMODAL_BY_NAME[name]
    return _find(name, _MULTIMODAL_BY_NAME | {entry.name: entry for entry in chat_models()})


def released_models() -> tuple[Released, ...]:
    """All models whose weights were released, in the order of the tables."""
    return _RELEASED


def released(name: str) -> Released:
    """A released model by name: `mask_rcnn_piip_tsb_1568_1120_672`, or as the zoo calls it, `piip_tsb_1568_1120_672`.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    return _find(name, _RELEASED_BY_NAME, "released")


def find(name: str) -> ZooEntry | ClassificationEntry:
    """A published dense model or classifier by name, also by that of its released file.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    known: dict[str, ZooEntry | ClassificationEntry] = {**_BY_NAME, **_CLASSIFIERS_BY_NAME}
    model = _RELEASED_BY_NAME.get(name)
    return _find(model.entry.name if model else name, known)


def _find(name: str, known: Mapping[str, _Entry], kind: str = "published") -> _Entry:
    try:
        return known[name]
    except KeyError:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        choices = f"close matches are {', '.join(close)}" if close else f"known are {', '.join(known)}"
        raise ConfigError(f"no {kind} model is named {name!r}; {choices}") from None
