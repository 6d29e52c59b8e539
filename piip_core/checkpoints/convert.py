"""State dicts of published models to ours and back, with an account of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import ClassifierConfig, PIIPConfig
from ..errors import CheckpointError, listed
from .branch_names import UNUSED
from .names import NameMap, published_names

_MOST_LISTED = 20


@dataclass
class ConversionReport:
    """Complete account of a conversion from one set of names to another.

    Attributes:
        source: What was converted, for messages (a file name).
        used: Source key -> target name.
        ignored: Source key -> why it is not needed.
        filled: Target name -> how it got its value although the source has none.
        unexplained: Source keys that no rule knows.
        missing: Target names that nothing provides.
        mismatched: Target name -> shapes of source and target.
        notes: Anything else worth knowing, such as casts.
    """

    source: str = "checkpoint"
    used: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every source key and every target tensor is accounted for."""
        return not (self.unexplained or self.missing or self.mismatched)

    def note(self, text: str) -> None:
        """Adds a note once; an empty one is none."""
        if text and text not in self.notes:
            self.notes.append(text)

    def compare(self, name: str, have: Sequence[int], want: Sequence[int]) -> None:
        """Notes a tensor of the model for which the file has another shape."""
        if tuple(have) != tuple(want):
            self.mismatched[name] = f"shape {tuple(have)} in the file, {tuple(want)} in the model"

    def add(self, part: ConversionReport, prefix: str, title: str) -> None:
        """Adds the account of a part, whose names are below a prefix on both sides."""
        self.used |= {prefix + key: prefix + name for key, name in part.used.items()}
        self.ignored |= {prefix + key: reason for key, reason in part.ignored.items()}
        self.filled |= {prefix + key: reason for key, reason in part.filled.items()}
        self.unexplained += [prefix + key for key in part.unexplained]
        self.missing += [prefix + key for key in part.missing]
        self.mismatched |= {f"{title}: {name}": shapes for name, shapes in part.mismatched.items()}
        for text in part.notes:
            self.note(f"{title}: {text}")

    def check(self, *, allow_incomplete: bool = False) -> ConversionReport:
        """Returns the report itself if it is complete, or if incompleteness was asked for.

        Raises:
            CheckpointError: Otherwise; the message lists the keys. Shapes that differ are never allowed.
        """
        if self.complete or (allow_incomplete and not self.mismatched):
            return self
        problems = "\n".join(self.problems())
        way_out = "" if self.mismatched else ", or go on without these keys (allow_incomplete=True, --allow-incomplete)"
        raise CheckpointError(
            f"{self.source} does not fit the model:\n{problems}\n"
            f"Use the configuration that the file was made with{way_out}"
        )

    def summary(self) -> str:
        """Multi-line text: counts, then every reason with the number of its keys, then every problem."""
        lines = [
            f"{self.source}: {len(self.used)} keys used, {len(self.ignored)} ignored with a reason, "
            f"{len(self.unexplained)} unexplained; {len(self.filled)} tensors filled, {len(self.missing)} missing"
        ]
        lines += [f"  note: {note}" for note in self.notes]
        for title, reasons in (("ignored", self.ignored), ("filled", self.filled)):
            for reason, count in Counter(reasons.values()).items():
                keys = [key for key, why in reasons.items() if why == reason]
                lines.append(f"  {title} {count}: {reason} ({listed(keys, 3)})")
        return "\n".join(lines + self.problems())

    def problems(self) -> list[str]:
        """What makes it incomplete, a line each."""
        lines = []
        if self.unexplained:
            lines.append(f"  {len(self.unexplained)} keys that no rule knows: {listed(self.unexplained, _MOST_LISTED)}")
        if self.missing:
            names = listed(self.missing, _MOST_LISTED)
            lines.append(f"  {len(self.missing)} tensors of the model that the file lacks: {names}")
        lines += [f"  {name}: {shapes}" for name, shapes in list(self.mismatched.items())[:_MOST_LISTED]]
        return lines


def from_published(
    state: Mapping[str, Tensor],
    config: PIIPConfig | ClassifierConfig,
    *,
    backbone_only: bool = False,
    source: str = "checkpoint",
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts a published state dict, whose name map is recognised by its keys.

    Args:
        state: With the prefix `backbone.` and perhaps a detector's neck and heads, or a bare backbone.
        config: The backbone or classifier it belongs to.
        backbone_only: Leave neck and heads out, and give names relative to `DensePIIP`.
        source: Name of the file, for messages.

    Returns:
        Our state dict (for a detector, under Detectron2's names), in the dtypes of the file, and the account; call its
        `check`.
    """
    names = published_names(config, state, backbone_only=backbone_only)
    outside = {key for key in state if backbone_only and not key.startswith(names.published_prefix)}
    inside = {key: state[key] for key in state if key not in outside}
    converted, report = to_ours(inside, names, source=source)
    report.ignored |= dict.fromkeys(outside, "not part of the backbone, which alone was asked for")
    if names.published_prefix and not names.detector and not backbone_only:
        report.note("the file has no neck and heads that are known here: a detector would start them at random")
    return converted, report


def to_ours(
    state: Mapping[str, Tensor], names: NameMap, *, source: str = "checkpoint"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts a published state dict by a given name map.

    Returns:
        Our state dict, in the dtypes of the file, and the account; call its `check`.
    """
    report = ConversionReport(source=source)
    table, unused, shapes = names.table(), names.unused_tensors(), names.shapes()
    converted: dict[str, Tensor] = {}
    parts: dict[tuple[str, int], dict[int, Tensor]] = {}
    for key, tensor in state.items():
        found = table.to_ours(key)
        if key in unused:
            report.ignored[key] = UNUSED
        elif found is None or found[0] not in shapes:
            report.unexplained.append(key)
        else:
            name, rule = found
            report.used[key] = name
            tensor = rule.change.to_ours(tensor)
            if rule.part is None:
                converted[name] = tensor
                report.note(rule.change.note)
            else:
                parts.setdefault((name, rule.parts), {})[rule.part] = tensor
    for (name, count), tensors in parts.items():
        if len(tensors) < count:
            continue  # missing
        if len({part.shape for part in tensors.values()}) == 1:
            converted[name] = torch.cat([tensors[part] for part in range(count)])
        else:
            different = ", ".join(str(tuple(tensors[part].shape)) for part in range(count))
            report.mismatched[name] = f"shapes {different} of its parts in the file, expected equal ones"
    _compare(converted, shapes, report)
    return {name: converted[name] for name in shapes if name in converted}, report


def to_published(
    state: Mapping[str, Tensor], names: NameMap, *, source: str = "model"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts our state dict to the published names.

    Args:
        state: State dict of `DensePIIP`, or of a Detectron2 model around it, as `names` says.
        names: The name map.
        source: Name of the model, for messages.

    Returns:
        The published state dict and the account; call its `check`.
    """
    report = ConversionReport(source=source)
    table, shapes = names.table(), names.shapes()
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = table.to_published(name)
        if not found or name not in shapes:
            report.unexplained.append(name)
            continue
        for key, rule in found:
            part = tensor if rule.part is None else tensor.chunk(rule.parts)[rule.part]
            published[key] = rule.change.to_published(part)
        report.used[name] = ", ".join(key for key, _ in found)
        report.note(found[0][1].change.note)
    _compare(state, shapes, report)
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    for key, tensor in names.unused_tensors().items():
        published[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        report.filled[key] = f"{UNUSED}; the published class has it"
    return published, report


def _compare(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size | None], report: ConversionReport) -> None:
    """Notes which of our tensors are missing or have another shape."""
    for name, shape in shapes.items():
        if name not in state:
            report.missing.append(name)
        elif shape is not None:
            report.compare(name, state[name].shape, shape)
