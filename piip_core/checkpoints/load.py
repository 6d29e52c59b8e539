"""Weights of whole models and of parts of them, whoever wrote the checkpoint and whatever model it is of."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..classifier import build_model
from ..config import ClassifierConfig, PIIPConfig
from ..errors import CheckpointError
from ..pyramid import PIIP
from .convert import from_published, model_shapes
from .lazy import LazyState
from .pretrained import convert_pretrained
from .read import read_checkpoint
from .report import ConversionReport

__all__ = ["build_trained", "find_pyramid", "load_part", "load_pyramid", "pyramid_prefix"]


def part_prefixes(state: Collection[str], names: Sequence[str]) -> list[str]:
    """What the names of a state dict have before those of a part, for every complete set of it."""
    prefixes = [key.removesuffix(names[0]) for key in state if key == names[0] or key.endswith(f".{names[0]}")]
    return [prefix for prefix in prefixes if all(prefix + name in state for name in names)]


def load_part(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a pyramid or backbone from a checkpoint of this project of whatever model around it.

    Raises:
        CheckpointError: If the file cannot be read, or does not hold exactly one set of all weights of the module.
    """
    state, names = read_checkpoint(path).state, list(module.state_dict())
    complete = part_prefixes(state, names)
    if len(complete) != 1:
        raise CheckpointError(
            f"{path}: holds {len(complete)} complete sets of the {len(names)} weights of this {type(module).__name__} "
            f"({names[0]} ...); expected one. Give the model the checkpoint was trained with; published files are "
            "converted by tools/convert_checkpoint.py"
        )
    try:
        module.load_state_dict({name: state[complete[0] + name] for name in names})
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights of another shape: {error}") from None


logger = logging.getLogger(__name__)

# The first tensor of a PIIP in a state dict, whatever holds it
_FIRST_BRANCH = re.compile(r"(|.*?\.)branches\.0\.model\.")


def find_pyramid(model: nn.Module) -> tuple[str, PIIP] | None:
    """The only PIIP inside a model and the prefix of its names in the state dict; None if there is none or several."""
    found = [(f"{name}." if name else "", module) for name, module in model.named_modules() if isinstance(module, PIIP)]
    return found[0] if len(found) == 1 else None


def pyramid_prefix(names: Iterable[str]) -> str | None:
    """The prefix of the names of the only PIIP in a state dict; None if there is none or several."""
    found = {match[1] for match in map(_FIRST_BRANCH.match, names) if match}
    return found.pop() if len(found) == 1 else None


@torch.no_grad()
def load_pyramid(pyramid: PIIP, state: Mapping[str, Tensor], *, source: str = "checkpoint") -> ConversionReport:
    """Loads branches and interactions from the state dict of any model that holds the same ones.

    Of each branch as from its own pretrained weights: position tables are resized to another grid, and class tokens
    left out where the branch has none. Interactions behind those of the file pass features on unchanged, as new ones
    do: classifiers that read class tokens have none behind the last blocks.

    Args:
        pyramid: What to fill.
        state: The other model's, such as `read_checkpoint(path).state` of a trained `PIIPClassifier`.
        source: Name of the weights, for messages.

    Returns:
        The account of every key of `state`, by the names inside `pyramid`.

    Raises:
        CheckpointError: If there is no pyramid in it, or another one; nothing is changed then.
    """
    prefix = pyramid_prefix(state)
    if prefix is None:
        raise CheckpointError(
            f"{source}: expected the weights of a model with one PIIP pyramid (PREFIX.branches.0.model.*), such as a "
            "trained classifier"
        )
    report = ConversionReport(source=source)
    report.ignored = {name: "not of the pyramid" for name in state if not name.startswith(prefix)}
    entries = LazyState.of(state).entries
    inside = LazyState({name.removeprefix(prefix): entries[name] for name in entries if name.startswith(prefix)})
    values = _branches(pyramid, inside, report) | _interactions(pyramid, inside, report)
    if not report.complete:
        raise CheckpointError(
            f"{source}: its pyramid is not that of the model:\n" + "\n".join(report.problems()) + "\nExpected branches "
            "of the same networks (embed_dim, depth, patch_size ...) and the same interactions; image sizes may differ"
        )
    target = pyramid.state_dict()  # shares memory with the parameters
    for name, tensor in values.items():
        target[name].copy_(tensor)
    return report


def _branches(pyramid: PIIP, state: LazyState, report: ConversionReport) -> dict[str, Tensor]:
    parts = _parts(state, "branches")
    values = {}
    for index, branch in enumerate(pyramid.branches):
        inner = f"branches.{index}.model."
        fitted, found = convert_pretrained(parts.pop(inner, LazyState({})), branch.model.state_dict())
        values |= {inner + name: tensor for name, tensor in fitted.items()}
        _join(report, found, inner, number=index + 1)
    report.unexplained += [prefix + name for prefix, part in parts.items() for name in part]
    return values


def _interactions(pyramid: PIIP, state: LazyState, report: ConversionReport) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in pyramid.state_dict().items() if name.startswith("interactions.")}
    found = [name for name in state if not name.startswith("branches.")]
    last = max((int(name.split(".")[1]) for name in found if name in wanted), default=-1)
    values = {}
    for name, tensor in wanted.items():
        if name in state:
            shapes = state.entries[name].shape, tensor.shape
            if shapes[0] != shapes[1]:
                report.mismatched[name] = f"shape {tuple(shapes[0])} in the file, {tuple(shapes[1])} in the model"
            values[name] = state[name]
            report.used[name] = name
        elif int(name.split(".")[1]) <= last:
            report.missing.append(name)
        else:
            report.filled[name] = "the file has no such interaction: it passes features on unchanged"
    report.unexplained += [name for name in found if name not in wanted]
    return values


def _parts(state: LazyState, kind: str) -> dict[str, LazyState]:
    """The tensors below `KIND.INDEX.NAME.`, each part by that prefix."""
    parts = defaultdict(dict)
    for name, entry in state.entries.items():
        words = name.split(".")
        if words[0] == kind:
            inner = ".".join(words[:3]) + "."
            parts[inner][name.removeprefix(inner)] = entry
    return {inner: LazyState(entries) for inner, entries in parts.items()}


def _join(report: ConversionReport, found: ConversionReport, prefix: str, *, number: int) -> None:
    """Adds the account of a branch."""
    report.used |= {prefix + key: prefix + name for key, name in found.used.items()}
    report.ignored |= {prefix + key: reason for key, reason in found.ignored.items()}
    report.filled |= {prefix + name: reason for name, reason in found.filled.items()}
    report.mismatched |= {f"branch {number}: {name}": shapes for name, shapes in found.mismatched.items()}
    report.unexplained += [prefix + key for key in found.unexplained]
    report.missing += [prefix + name for name in found.missing]
    for text in found.notes:
        report.note(f"branch {number}: {text}")


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
