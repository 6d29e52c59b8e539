"""Which published model a checkpoint is, from the shapes of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import zoo
from ..branches import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig
from ..config import ClassifierConfig, PIIPConfig
from ..errors import CheckpointError, NotSupportedYet
from .branch_names import default_branch_class
from .convert import PUBLISHED_BACKBONE, detector_of, from_published, published_names

__all__ = ["Recognised", "fit_variant", "recognise"]


@dataclass(frozen=True)
class Recognised:
    """Published models whose tensors have the shapes of a file.

    Attributes:
        names: Their names in the zoo. Models that differ in image sizes alone cannot be told apart.
        config: The configuration of the first; right for converting a file of any of them.
        branch4_as_released: Whether Branch 4 is the copy of Branch 3 that the public code builds.
    """

    names: tuple[str, ...]
    config: PIIPConfig | ClassifierConfig
    branch4_as_released: bool = False


# The bias of a published classifier, the first one of separate heads
_CLASSIFIERS = {"separate": "branch1.head.bias", "merged": "cls_head.bias"}

# The first convolution of a branch in published names, by family
_FIRST_KERNELS = {
    ViTConfig: "patch_embed.proj.weight",
    BEiTConfig: "patch_embed.proj.weight",
    UniPerceiverConfig: "visual_embed.patch_embed.proj.weight",
    ConvNeXtConfig: "convnext_model.embeddings.patch_embeddings.weight",
}


def recognise(shapes: Mapping[str, Sequence[int]]) -> Recognised:
    """Finds the published models that a published state dict can belong to.

    Args:
        shapes: Published name -> shape.

    Raises:
        CheckpointError: If no model of the zoo fits.
    """
    found: dict[bool, list[tuple[str, PIIPConfig | ClassifierConfig]]] = {False: [], True: []}
    known: dict[tuple[object, ...], bool] = {}
    for name, first in _candidates(shapes):
        for as_released, config in _variants(first):
            structure = _structure(config)
            if structure not in known:
                known[structure] = _fits(shapes, config)
            if known[structure]:
                found[as_released].append((name, config))
                break
    for as_released, matches in found.items():
        if matches:
            return Recognised(tuple(name for name, _ in matches), matches[0][1], as_released)
    raise CheckpointError(
        "the tensors fit no published model of this version; name the configuration (--config), known are "
        + ", ".join(name for name, _ in _candidates(shapes))
    )


def _candidates(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, PIIPConfig | ClassifierConfig]]:
    """Published models of the kind of the file, by name; classifiers with the file's number of classes."""
    heads = {head: shapes[key][0] for head, key in _CLASSIFIERS.items() if key in shapes}
    if heads:
        for entry in zoo.classification_entries():
            if entry.config.head in heads:
                yield entry.name, dataclasses.replace(entry.config, num_classes=heads[entry.config.head])
        return
    detector = detector_of(shapes)
    for entry in zoo.entries():
        if detector in (None, "rpn", entry.head):
            yield entry.name, entry.config


def fit_variant(
    shapes: Mapping[str, Sequence[int]], config: PIIPConfig | ClassifierConfig
) -> PIIPConfig | ClassifierConfig:
    """The configuration itself, or with Branch 4 as released if only that fits the shapes."""
    return next((variant for _, variant in _variants(config) if _fits(shapes, variant)), config)


def _variants(config: PIIPConfig | ClassifierConfig) -> Iterator[tuple[bool, PIIPConfig | ClassifierConfig]]:
    yield False, config
    if isinstance(config, PIIPConfig) and len(config.branches) == 4:
        yield True, zoo.tsbl_as_released(config)


def _structure(config: PIIPConfig | ClassifierConfig) -> tuple[object, ...]:
    """What decides names and shapes of the parameters."""
    if isinstance(config, ClassifierConfig):
        return *_structure(config.pyramid), config.head, config.num_classes
    branches = tuple((branch.network, default_branch_class(branch)) for branch in config.branches)
    return branches, config.num_interactions, config.interaction, config.merging


def _fits(shapes: Mapping[str, Sequence[int]], config: PIIPConfig | ClassifierConfig) -> bool:
    prefix = PUBLISHED_BACKBONE if any(key.startswith(PUBLISHED_BACKBONE) for key in shapes) else ""
    backbone = {key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}
    pyramid = config.pyramid if isinstance(config, ClassifierConfig) else config
    if not _same_kernels(backbone, pyramid):  # much cheaper than building the model
        return False
    classes = published_names(config, list(shapes)).branch_classes
    if any(have != default_branch_class(branch) for have, branch in zip(classes, pyramid.branches, strict=True)):
        return False
    state = {key: torch.empty(shape, device="meta") for key, shape in backbone.items()}
    try:
        return from_published(state, config)[1].complete
    except (CheckpointError, NotSupportedYet):
        return False


def _same_kernels(shapes: Mapping[str, tuple[int, ...]], config: PIIPConfig) -> bool:
    """Whether every branch has the patch or stem convolution of its configured class."""
    for number, branch in enumerate(config.branches, 1):
        prefix = "" if len(config.branches) == 1 else f"branch{number}."
        kernel = shapes.get(prefix + _FIRST_KERNELS[type(branch.network)])
        if kernel is None or kernel[0] != branch.network.dims[0]:
            return False
    return True
