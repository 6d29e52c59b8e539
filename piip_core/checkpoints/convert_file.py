"""Conversion of checkpoint files, from whatever says which model they hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import zoo
from ..classifier_config import ClassifierConfig
from ..config import PIIPConfig
from ..errors import CheckpointError, ConfigError
from ..files import read_json
from .convert import from_published, our_names, published_names, to_published
from .files import CheckpointFile, read_checkpoint, write_checkpoint
from .lazy import LazyState, LazyTensor
from .names import PublishedNames
from .recognise import fit_variant, recognise
from .report import ConversionReport

__all__ = ["Conversion", "convert_file", "read_config"]

NOT_WEIGHTS = "not part of the weights"


@dataclass(frozen=True)
class Conversion:
    """Result of `convert_file`.

    Attributes:
        report: What happened to every key.
        model: What the file was taken for, in words.
        path: What was written: the target, or the index of its shards.
    """

    report: ConversionReport
    model: str
    path: Path


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    config: PIIPConfig | ClassifierConfig | None = None,
    to_public: bool = False,
    branch_classes: Sequence[str] | None = None,
    backbone_only: bool = False,
    allow_incomplete: bool = False,
    unsafe_pickle: bool = False,
    master_weights: bool = False,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Converts a published checkpoint to ours, or back; the target appears once it is complete.

    Args:
        source: A .pth or .safetensors file, a sharded checkpoint or a DeepSpeed folder; see `read_checkpoint`.
        target: File to write, .pth or .safetensors; a large .safetensors in shards, see `write_checkpoint`. Ours has
            the weights under "model", as Detectron2 reads them, and a description with which it converts back.
        config: The backbone or classifier. None takes the file's description, or recognises a model of the zoo by its
            shapes.
        to_public: Convert to the published names.
        branch_classes: With `to_public`: published class of each branch, where the file has no description.
        backbone_only: Leave neck and heads out, and give names relative to `DensePIIP`.
        allow_incomplete: Write although keys have no explanation; the report lists them.
        unsafe_pickle: Allow Python objects in the source; see `read_checkpoint`.
        master_weights: Take the fp32 weights of a DeepSpeed checkpoint; see `read_checkpoint`.
        ema: Take the moving average of the weights; see `read_checkpoint`.
        dtype: Type for the floating-point tensors; None keeps that of each.

    Raises:
        CheckpointError: If the source cannot be read, is not recognised, does not fit, or has values beyond the range
            of `dtype`.
        NotSupportedYet: If the model has parts that this version does not know.
    """
    file = read_checkpoint(source, unsafe_pickle=unsafe_pickle, master_weights=master_weights, ema=ema, verify=True)
    if to_public:
        names, model = _names_of_ours(file, config, branch_classes)
        state, report = to_published(file.state, names, source=str(source))
        wrapper, description = "state_dict", None
    else:
        config, model = _config_of_published(file, config)
        if backbone_only and isinstance(config, ClassifierConfig):
            raise CheckpointError(
                f"{source}: holds a classifier: expected no --backbone-only. Detectors and segmentors take the pyramid "
                "out of the whole converted file (train.init_checkpoint)"
            )
        state, report = from_published(file.state, config, backbone_only=backbone_only, dtype=None, source=str(source))
        wrapper = "model"
        description = published_names(config, file.state, backbone_only=backbone_only).to_dict()
    report.ignored |= dict.fromkeys(file.extras, NOT_WEIGHTS)
    report.check(allow_incomplete=allow_incomplete)
    written = write_checkpoint(target, _cast(state, dtype, report), wrapper=wrapper, description=description)
    return Conversion(report, model, written)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None, report: ConversionReport) -> LazyState:
    """The state dict in another type; each tensor is cast when it is written."""
    entries = LazyState.of(state).entries
    changed = [key for key, entry in entries.items() if entry.dtype.is_floating_point and entry.dtype != dtype]
    if dtype is None or not changed:
        return LazyState(entries)
    for other, count in Counter(entries[key].dtype for key in changed).items():
        report.notes.append(f"{count} tensors cast from {other} to {dtype}")
    return LazyState(entries | {key: _cast_tensor(key, entries[key], dtype) for key in changed})


def _cast_tensor(key: str, entry: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    def load() -> Tensor:
        tensor = entry.load()
        cast = tensor.to(dtype)
        if not torch.equal(cast.isfinite(), tensor.isfinite()):
            raise CheckpointError(f"{key}: has values beyond the range of {dtype}; choose another --dtype")
        return cast

    return LazyTensor(entry.shape, dtype, load)


def read_config(text: str) -> PIIPConfig | ClassifierConfig:
    """A configuration by its name in the zoo, or from a .json file with its `to_dict()`.

    Raises:
        ConfigError: For an unknown name or wrong fields.
    """
    if not text.endswith(".json"):
        return zoo.find(text).config
    data = read_json(text, ConfigError)
    return (ClassifierConfig if "pyramid" in data else PIIPConfig).from_dict(data)


def _config_of_published(
    file: CheckpointFile, config: PIIPConfig | ClassifierConfig | None
) -> tuple[PIIPConfig | ClassifierConfig, str]:
    shapes = file.state.shapes()
    if config is not None:
        return fit_variant(shapes, config), "the given configuration"
    try:
        found = recognise(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    branch4 = ", Branch 4 built from the settings of Branch 3" if found.branch4_as_released else ""
    return found.config, f"recognised as {' or '.join(found.names)}{branch4}"


def _names_of_ours(
    file: CheckpointFile, config: PIIPConfig | ClassifierConfig | None, branch_classes: Sequence[str] | None
) -> tuple[PublishedNames, str]:
    if config is not None:
        return our_names(config, file.state, branch_classes), "the given configuration"
    if file.description is None:
        raise CheckpointError(
            f"{file.path}: the file does not say which model it holds (only files that this tool converted do); "
            "name its configuration (--config)"
        )
    return PublishedNames.from_dict(file.description), "the description in the file"
