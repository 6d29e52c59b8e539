"""Weights of whole models and of parts of them, whoever wrote the checkpoint and whatever model it is of."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..classifier import PIIPClassifier, build_model
from ..config import ClassifierConfig, PIIPConfig
from ..errors import CheckpointError
from ..pyramid import PIIP, DensePIIP
from .convert import ConversionReport, from_published
from .formats import CheckpointFile, LazyState
from .names import model_shapes
from .pretrained import convert_pretrained
from .reading import read_checkpoint
from .released import find_checkpoint

# The first tensor of a PIIP in a state dict, whatever holds it
_FIRST_BRANCH = re.compile(r"(|.*?\.)branches\.0\.model\.")


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, ema: bool = False) -> None:
    """Loads a pyramid, backbone or classifier from the checkpoint of that model, or of one that holds it.

    Args:
        model: What to fill; of `DensePIIP` and `PIIPClassifier`, published checkpoints are read as well.
        path: A checkpoint of our training (of a detector, too), of timm, transformers or the hub, or a published one;
            or the name of a released model, see `zoo.released`.
        ema: As in `read_checkpoint`.

    Raises:
        CheckpointError: If the file cannot be read, or does not hold exactly one set of all weights of the model.
    """
    _load(model, _read(path, ema))


def build_trained(
    configs: Sequence[PIIPConfig | ClassifierConfig], path: str | os.PathLike[str], *, ema: bool = False
) -> nn.Module:
    """The backbone or classifier that a checkpoint holds, with its weights, in evaluation mode.

    Args:
        configs: What it may be, in the order in which they are tried; a classifier may have other classes.
        path: As in `load_checkpoint`.
        ema: As in `read_checkpoint`.

    Raises:
        CheckpointError: If the file cannot be read or fits none of the configurations.
    """
    file = _read(path, ema)
    possible = [_with_classes_of(config, file.state.shapes()) for config in configs]
    config = next((c for c in possible if _prefixes(file.state, model_shapes(c))), possible[0])
    model = build_model(config)
    _load(model, file)
    return model.eval()


def _read(path: str | os.PathLike[str], ema: bool) -> CheckpointFile:
    found = find_checkpoint(path, ema=ema)
    return read_checkpoint(found, ema=ema and found == Path(path))  # a released one has its own file of averages


def _load(model: nn.Module, file: CheckpointFile) -> None:
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    complete = _prefixes(file.state, wanted)
    if len(complete) == 1:
        entries = file.state.below(complete[0]).entries
        for name, shape in wanted.items():
            if entries[name].shape != shape:
                raise CheckpointError(
                    f"{file.path}: {complete[0]}{name} has shape {tuple(entries[name].shape)}, expected "
                    f"{tuple(shape)}; name the model that the file holds"
                )
        model.load_state_dict({name: entries[name].load() for name in wanted})
    elif isinstance(model, DensePIIP | PIIPClassifier) and not complete and pyramid_prefix(file.state) is None:
        config = model.config if isinstance(model, PIIPClassifier) else model.pyramid.config
        only = isinstance(model, DensePIIP)
        state, report = from_published(file.state, config, backbone_only=only, source=str(file.path))
        report.check()
        model.load_state_dict(state)
    else:
        raise CheckpointError(
            f"{file.path}: holds {len(complete)} complete sets of the {len(wanted)} weights of this "
            f"{type(model).__name__} ({next(iter(wanted))} ...); expected one. Name the model that the file holds; a "
            "published pyramid is converted by tools/convert_checkpoint.py"
        )


def _prefixes(state: Collection[str], names: Iterable[str]) -> list[str]:
    """What the names of a state dict have before those of a part, for every complete set of it."""
    first, *others = names
    prefixes = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    return [prefix for prefix in prefixes if all(prefix + name in state for name in others)]


def _with_classes_of(
    config: PIIPConfig | ClassifierConfig, shapes: Mapping[str, tuple[int, ...]]
) -> PIIPConfig | ClassifierConfig:
    """A classifier for as many classes as the file has."""
    if isinstance(config, PIIPConfig):
        return config
    name = "head.classifier.bias" if config.head == "merged" else "head.classifiers.1.bias"
    found = {shapes[prefix + name][0] for prefix in _prefixes(shapes, [name])}
    return dataclasses.replace(config, num_classes=found.pop()) if len(found) == 1 else config


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
    """Starts a pyramid from the state dict of another kind of model with the same branches and interactions.

    Of each branch as from its own pretrained weights: position tables are resized to another grid, and class tokens
    left out where the branch has none. Interactions after those of the file pass features on unchanged, as new ones
    do: classifiers that read class tokens have none after the last blocks.

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
    inside = LazyState.of(state).below(prefix)
    values: dict[str, Tensor] = {}
    known: set[str] = set()
    for index, branch in enumerate(pyramid.branches):
        below = f"branches.{index}.model."
        fitted, found = convert_pretrained(inside.below(below), branch.model.state_dict())
        values |= {below + name: tensor for name, tensor in fitted.items()}
        known |= {name for name in inside if name.startswith(below)}
        report.add(found, below, f"branch {index + 1}")
    target = pyramid.state_dict()
    interactions = {name: tensor for name, tensor in target.items() if name.startswith("interactions.")}
    values |= _interactions(interactions, inside, report)
    report.unexplained += [name for name in inside if name not in known and name not in interactions]
    if not report.complete:
        raise CheckpointError(
            f"{source}: its pyramid is not that of the model:\n" + "\n".join(report.problems()) + "\nExpected branches "
            "of the same networks (embed_dim, depth, patch_size ...) and the same interactions; image sizes may differ"
        )
    for name, tensor in values.items():
        target[name].copy_(tensor)
    return report


def _interactions(target: Mapping[str, Tensor], state: LazyState, report: ConversionReport) -> dict[str, Tensor]:
    last = max((int(name.split(".")[1]) for name in target if name in state), default=-1)
    values = {}
    for name, tensor in target.items():
        if name in state:
            report.compare(name, state.entries[name].shape, tensor.shape)
            report.used[name] = name
            values[name] = state[name]
        elif int(name.split(".")[1]) <= last:
            report.missing.append(name)
        else:
            report.filled[name] = "the file has no such interaction: it passes features on unchanged"
    return values
