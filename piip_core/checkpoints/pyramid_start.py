"""The pyramid of one model as the start of another: a classifier's in a detector, a segmentor or a chat model."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..pyramid import PIIP
from .lazy import LazyState
from .pretrained import convert_pretrained
from .report import ConversionReport

__all__ = ["find_pyramid", "load_pyramid", "pyramid_prefix"]

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
