"""Published models by name: their configuration, how they were trained, and the numbers published for them.

This is the one place for facts about published models; Detectron2 configs and the tables of the READMEs read it.
"""

from __future__ import annotations

import difflib

from ..errors import ConfigError
from . import cascade, convnext, deit, large, pretraining
from .deit import baseline, deit_pyramid, tsbl_as_released
from .entry import PublishedNumbers, ZooEntry
from .networks import VIT

__all__ = [
    "VIT",
    "PublishedNumbers",
    "ZooEntry",
    "baseline",
    "deit_pyramid",
    "entries",
    "get",
    "names",
    "tsbl_as_released",
]

_ENTRIES = (
    *deit.ENTRIES,
    *large.ENTRIES,
    *pretraining.ENTRIES,
    *convnext.ENTRIES,
    *cascade.ENTRIES,
)
_BY_NAME = {entry.name: entry for entry in _ENTRIES}


def entries() -> tuple[ZooEntry, ...]:
    """All published models, in the order of the tables."""
    return _ENTRIES


def names() -> list[str]:
    """Names of all published models, in the order of the tables."""
    return list(_BY_NAME)


def get(name: str) -> ZooEntry:
    """A published model by name.

    Raises:
        ConfigError: For an unknown name; the message lists the closest ones.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        close = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4) or _BY_NAME
        raise ConfigError(f"no published model is named {name!r}; close matches are {', '.join(close)}") from None
