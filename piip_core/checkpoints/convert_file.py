"""Conversion of checkpoint files: which model they hold, and their names to ours or back."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import zoo
from ..config import BranchConfig, ClassifierConfig, PIIPConfig
from ..errors import CheckpointError, ConfigError, NotSupportedYet
from ..files import read_json
from .branch_names import branch_classes_of, branch_prefix, default_branch_class
from .convert import ConversionReport, from_published, to_published
from .formats import CheckpointFile, LazyState, LazyTensor
from .names import (
    PUBLISHED_BACKBONE,
    PublishedNames,
    config_from_dict,
    detector_of,
    our_names,
    published_names,
    pyramid_of,
)
from .reading import read_checkpoint
from .writing import write_checkpoint

_Config = PIIPConfig | ClassifierConfig
# The bias of a published classifier, the first one of separate heads
_CLASSIFIERS = {"separate": "branch1.head.bias", "merged": "cls_head.bias"}


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        report: What happened to every key.
        model: What the source was taken for, in words.
        path: What was written: a folder, a file, or the index of its shards.
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
    dtype: torch.dtype | None = None,
    **reading: bool,
) -> Conversion:
    """Converts a published checkpoint to ours, or back; the target appears once it is complete.

    Args:
        source: What `read_checkpoint` reads.
        target: File for `write_checkpoint`. Ours has the weights under "model", as Detectron2 reads them, and a
            description with which it converts back.
        config: The backbone or classifier. None takes the file's description, or recognises a model of the zoo by its
            shapes.
        to_public: Convert to the published names.
        branch_classes: With `to_public`: published class of each branch, where the file has no description.
        backbone_only: Leave neck and heads out, and give names relative to `DensePIIP`.
        allow_incomplete: Write although keys have no explanation; the report lists them.
        dtype: Type for the floating-point tensors; None keeps that of each.
        reading: `unsafe_pickle`, `master_weights` and `ema` of `read_checkpoint`.

    Raises:
        CheckpointError: If the source cannot be read, is not recognised, does not fit, or has values beyond the range
            of `dtype`.
        NotSupportedYet: If the model has parts that this version does not know.
    """
    file = read_checkpoint(source, verify=True, **reading)
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
        state, report = from_published(file.state, config, backbone_only=backbone_only, source=str(source))
        wrapper = "model"
        description = published_names(config, file.state, backbone_only=backbone_only).to_dict()
    report.ignored |= dict.fromkeys(file.extras, "not part of the weights")
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
    return config_from_dict(read_json(text, ConfigError)) if text.endswith(".json") else zoo.find(text).config


def _config_of_published(
    file: CheckpointFile, config: PIIPConfig | ClassifierConfig | None
) -> tuple[PIIPConfig | ClassifierConfig, str]:
    shapes = file.state.shapes()
    if config is not None:
        return next((c for c in _variants(config) if _fits(shapes, c)), config), "the given configuration"
    try:
        found = recognise(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    return next(iter(found.values())), f"recognised as {' or '.join(found)}"


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


def recognise(shapes: Mapping[str, Sequence[int]]) -> dict[str, PIIPConfig | ClassifierConfig]:
    """Finds the published models that a published state dict can belong to.

    Args:
        shapes: Published name -> shape.

    Returns:
        Their names in the zoo, and the configurations that fit; of models with four branches perhaps with Branch 4 as
        released. Those that differ in image sizes or windows alone cannot be told apart, and convert a file alike.

    Raises:
        CheckpointError: If no model of the zoo fits.
    """
    candidates = dict(_candidates(shapes))
    found: dict[str, _Config] = {}
    known: dict[tuple[object, ...], bool] = {}
    for name, config in ((name, variant) for name, first in candidates.items() for variant in _variants(first)):
        structure = _structure(config)
        if structure not in known:
            known[structure] = _fits(shapes, config)
        if known[structure]:
            found.setdefault(name, config)
    if not found:
        raise CheckpointError(
            "the tensors fit no published model of this version; name the configuration (--config), known are "
            + ", ".join([*zoo.names(), *(entry.name for entry in zoo.classification_entries())])
        )
    return found


def _candidates(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, _Config]]:
    """Published models of the kind of the file, by name; classifiers with the file's number of classes."""
    heads = {head: shapes[key][0] for head, key in _CLASSIFIERS.items() if key in shapes}
    if heads:
        for classifier in zoo.classification_entries():
            if classifier.config.head in heads:
                yield classifier.name, dataclasses.replace(classifier.config, num_classes=heads[classifier.config.head])
        return
    detector = detector_of(shapes)
    for entry in zoo.entries():
        if detector in (None, "rpn", entry.head):
            yield entry.name, entry.config


def _variants(config: _Config) -> Iterator[_Config]:
    """The configuration, and with the copy of Branch 3 as Branch 4 that the public code builds."""
    yield config
    if isinstance(config, PIIPConfig) and len(config.branches) == 4:
        yield zoo.tsbl_as_released(config)


def _structure(config: _Config) -> tuple[object, ...]:
    """What decides names and shapes of the parameters."""
    if isinstance(config, ClassifierConfig):
        return *_structure(config.pyramid), config.head, config.num_classes
    branches = tuple((branch.network, default_branch_class(branch)) for branch in config.branches)
    return branches, config.num_interactions, config.interaction, config.merging


def _fits(shapes: Mapping[str, Sequence[int]], config: _Config) -> bool:
    prefix = PUBLISHED_BACKBONE if any(key.startswith(PUBLISHED_BACKBONE) for key in shapes) else ""
    backbone = {key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}
    branches = pyramid_of(config).branches
    classes = tuple(map(default_branch_class, branches))
    try:
        # Much cheaper than building the model
        if not _have_widths(backbone, branches) or branch_classes_of(backbone, len(branches)) != classes:
            return False
        state = {key: torch.empty(shape, device="meta") for key, shape in backbone.items()}
        return from_published(state, config)[1].complete
    except (CheckpointError, NotSupportedYet):
        return False


def _have_widths(shapes: Mapping[str, tuple[int, ...]], branches: Sequence[BranchConfig]) -> bool:
    """Whether every branch's narrowest convolution, of patches or stem, has as many channels as its first block."""
    for number, branch in enumerate(branches, 1):
        prefix = branch_prefix(number, len(branches))
        widths = [shape[0] for key, shape in shapes.items() if key.startswith(prefix) and len(shape) > 3]
        if branch.network.dims[0] != min(widths, default=0):
            return False
    return True
