"""LazyConfig nodes from piip_core's configuration dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

from detectron2.config import LazyCall
from omegaconf import DictConfig

from piip_core import BranchConfig


def branches_in_order(**branches: BranchConfig) -> tuple[BranchConfig, ...]:
    """The branches `branch1`, `branch2`, ... as a tuple.

    OmegaConf cannot hold dataclass objects in a list, and named branches read better on a command line.
    """
    return tuple(branches[f"branch{number}"] for number in range(1, len(branches) + 1))


def lazy_dataclass(config: Any) -> DictConfig:
    """Describes a configuration dataclass as a LazyConfig node that instantiates to an equal one.

    Every field can then be overridden on the command line, for example
    `model.backbone.bottom_up.config.branches.branch1.image_size=448`. Dataclasses inside of it become nodes too,
    branches under their number.
    """
    return LazyCall(type(config))(**{f.name: _lazy(getattr(config, f.name)) for f in dataclasses.fields(config)})


def _lazy(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return lazy_dataclass(value)
    if not isinstance(value, tuple):
        return value
    if value and isinstance(value[0], BranchConfig):
        named = {f"branch{number}": lazy_dataclass(branch) for number, branch in enumerate(value, 1)}
        return LazyCall(branches_in_order)(**named)
    return [_lazy(v) for v in value]
