"""A whole model from a checkpoint, whoever wrote it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..classifier import build_model
from ..config import ClassifierConfig, PIIPConfig
from ..errors import CheckpointError
from .convert import from_published, model_shapes
from .files import read_checkpoint
from .part import part_prefixes
from .pyramid_start import pyramid_prefix

__all__ = ["build_trained"]

Shapes = Mapping[str, torch.Size]


def build_trained(
    configs: Sequence[PIIPConfig | ClassifierConfig], path: str | os.PathLike[str], *, ema: bool = False
) -> nn.Module:
    """The backbone or classifier that a checkpoint holds, with its weights, in evaluation mode.

    Args:
        configs: What it may be, in the order in which they are tried; a classifier may have other classes.
        path: A checkpoint of our training (of a detector, too), of timm, transformers or the hub, or a published one.
        ema: As in `read_checkpoint`.

    Raises:
        CheckpointError: If the file cannot be read or fits none of the configurations.
    """
    file = read_checkpoint(path, ema=ema)
    shapes = file.state.shapes()
    for config in (_with_classes_of(config, shapes) for config in configs):
        wanted = model_shapes(config)
        for prefix in part_prefixes(shapes, list(wanted)):
            _check_shapes(file.path, {prefix + name: shape for name, shape in wanted.items()}, shapes)
            return _loaded(config, {name: file.state[prefix + name] for name in wanted})
    backbone_only = isinstance(configs[0], PIIPConfig)
    if pyramid_prefix(shapes) is not None:
        kind = "backbone" if backbone_only else "classifier"
        raise CheckpointError(f"{path}: its names are not those of this {kind}; name the model that the file holds")
    state, report = from_published(file.state, configs[0], backbone_only=backbone_only, source=str(path))
    report.check()
    return _loaded(configs[0], state)


def _loaded(config: PIIPConfig | ClassifierConfig, state: Mapping[str, Tensor]) -> nn.Module:
    model = build_model(config)
    model.load_state_dict(state)
    return model.eval()


def _with_classes_of(config: PIIPConfig | ClassifierConfig, shapes: Shapes) -> PIIPConfig | ClassifierConfig:
    """A classifier for as many classes as the file has."""
    if isinstance(config, PIIPConfig):
        return config
    name = "head.classifier.bias" if config.head == "merged" else "head.classifiers.1.bias"
    found = {shapes[prefix + name][0] for prefix in part_prefixes(shapes, [name])}
    return dataclasses.replace(config, num_classes=found.pop()) if len(found) == 1 else config


def _check_shapes(path: Path, wanted: Shapes, shapes: Shapes) -> None:
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(shapes[name])}, expected {tuple(shape)}; name the model that the "
                "file holds"
            )
