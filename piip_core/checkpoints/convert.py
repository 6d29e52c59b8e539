"""Published PIIP checkpoints to our state dict and back, with an account of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..classifier import build_model
from ..config import ClassifierConfig, PIIPConfig
from ..errors import CheckpointError
from ..meta import on_meta
from ..pyramid import PIIP
from .branch_names import branch_class_of, default_branch_class
from .head_names import HEADS
from .names import PublishedNames
from .public_config import branch_shapes
from .report import ConversionReport
from .rules import PARTS, Change, Rule, RuleTable

__all__ = ["detector_of", "from_published", "model_shapes", "our_names", "published_names", "to_published"]

PUBLISHED_BACKBONE = "backbone."
"""Where published models hold the backbone."""

OUTSIDE = "not part of the backbone, which alone was asked for"


@lru_cache(maxsize=64)  # more than the zoo has: recognising a file may need many
def model_shapes(config: PIIPConfig | ClassifierConfig) -> Mapping[str, torch.Size]:
    """Name and shape of every tensor of `DensePIIP(config)` or `PIIPClassifier(config)`, without allocating it.

    Without merging, those of a module whose `pyramid` is `PIIP(config)`.
    """
    with on_meta():
        model = build_model(config)
        if isinstance(model, PIIP):
            model = nn.ModuleDict({"pyramid": model})
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return MappingProxyType(shapes)


def published_names(
    config: PIIPConfig | ClassifierConfig | None, keys: Collection[str], *, backbone_only: bool = False
) -> PublishedNames:
    """The name map for a configuration and the key names of a published file.

    Branch classes, the detector and the prefix of the backbone are recognised by the keys.

    Args:
        config: Configuration of the backbone or classifier; None if the file holds heads alone.
        keys: Names in the file.
        backbone_only: Give our names relative to `DensePIIP`, not to a Detectron2 model.

    Raises:
        CheckpointError: If a classifier reads class tokens.
        NotSupportedYet: If a branch is of a family without a name table.
    """
    if config is None:
        return PublishedNames(None, detector=detector_of(keys))
    if isinstance(config, ClassifierConfig):
        _check_published_form(config)
    prefix = PUBLISHED_BACKBONE if any(key.startswith(PUBLISHED_BACKBONE) for key in keys) else ""
    inside = {key.removeprefix(prefix): () for key in keys if key.startswith(prefix)}
    count = len(_pyramid(config).branches)
    numbers = [None] if count == 1 else range(1, count + 1)
    detector = None if backbone_only or not prefix else detector_of(keys)
    return PublishedNames(
        config,
        branch_classes=tuple(branch_class_of(list(branch_shapes(inside, number))) for number in numbers),
        detector=detector,
        ours_prefix=HEADS[detector or "rpn"].backbone if prefix and not backbone_only else "",
        published_prefix=prefix,
    )


def our_names(
    config: PIIPConfig | ClassifierConfig, keys: Collection[str], branch_classes: Sequence[str] | None = None
) -> PublishedNames:
    """The name map for a configuration and the key names of a file of ours.

    Args:
        config: Configuration of the backbone or classifier.
        keys: Names in the file: of `DensePIIP`, `PIIPClassifier`, or of a Detectron2 model.
        branch_classes: Published class of each branch; None for `default_branch_class`. Our names do not tell.

    Raises:
        CheckpointError: If a classifier reads class tokens.
    """
    if isinstance(config, ClassifierConfig):
        _check_published_form(config)
    places = {head.backbone for head in HEADS.values()}
    prefix = next((place for place in places if any(key.startswith(place) for key in keys)), "")
    return PublishedNames(
        config,
        branch_classes=tuple(branch_classes or map(default_branch_class, _pyramid(config).branches)),
        detector=detector_of(keys, ours=True) if prefix else None,
        ours_prefix=prefix,
        published_prefix=PUBLISHED_BACKBONE if prefix else "",
    )


def _pyramid(config: PIIPConfig | ClassifierConfig) -> PIIPConfig:
    return config.pyramid if isinstance(config, ClassifierConfig) else config


def _check_published_form(config: ClassifierConfig) -> None:
    if config.head == "separate" and config.pooling != "first_patch":
        raise CheckpointError(
            f"a classifier with pooling={config.pooling!r} has no published form: expected pooling='first_patch', and "
            "networks with class_position=False"
        )


def detector_of(keys: Collection[str], *, ours: bool = False) -> str | None:
    """The detector whose head names explain most of the keys; the smallest one of several, None if none does any."""
    translate = RuleTable.to_published if ours else RuleTable.to_ours
    known = {}
    for name, head in HEADS.items():
        table, backbone = RuleTable(head.rules), head.backbone if ours else PUBLISHED_BACKBONE
        known[name] = sum(translate(table, key) is not None for key in keys if not key.startswith(backbone))
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def from_published(
    state: Mapping[str, Tensor],
    config: PIIPConfig | ClassifierConfig | None,
    *,
    names: PublishedNames | None = None,
    backbone_only: bool = False,
    dtype: torch.dtype | None = torch.float32,
    source: str = "checkpoint",
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts a published state dict.

    Args:
        state: With the prefix `backbone.` and perhaps a detector's neck and heads, or a bare backbone, or heads alone.
        config: The backbone or classifier it belongs to; None for heads alone.
        names: The name map; None recognises a detection model's by the keys (`published_names`).
        backbone_only: Leave neck and heads out, and give names relative to `DensePIIP`.
        dtype: Type for floating-point tensors (bf16 runs leave mixed types behind); None keeps what the file has.
        source: Name of the file, for messages.

    Returns:
        Our state dict (for a detector, under Detectron2's names) and the account; call its `check`.
    """
    report = ConversionReport(source=source)
    names = names or published_names(config, state, backbone_only=backbone_only)
    table, unused, shapes = names.table(), names.unused_tensors(), _our_shapes(names)
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        found = table.to_ours(key)
        if key in unused:
            report.ignored[key] = unused[key].reason
        elif backbone_only and not key.startswith(names.published_prefix):
            report.ignored[key] = OUTSIDE
        elif found is None or found[0] not in shapes:
            report.unexplained.append(key)
        else:
            name, rule = found
            report.used[key] = name
            if rule.part is None:
                converted[name] = rule.change.to_ours(tensor)
                _account(report, name, rule, converted[name].shape, shapes[name])
            else:
                parts.setdefault(name, {})[rule.part] = tensor
    for name, found in parts.items():
        _join(converted, report, name, found, shapes[name])
    report.missing = [name for name in shapes if name not in converted]
    if config is not None and names.published_prefix and not names.detector and not backbone_only:
        report.notes.append("the file has no neck and heads that are known here: a detector would start them at random")
    return _cast(converted, dtype, report), report


def to_published(
    state: Mapping[str, Tensor], names: PublishedNames, *, source: str = "model"
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
    table, shapes = names.table(), _our_shapes(names)
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = table.all_published(name)
        if not found or name not in shapes:
            report.unexplained.append(name)
            continue
        published |= {key: rule.take(tensor) for key, rule in found}
        report.used[name] = ", ".join(key for key, _ in found)
        _account(report, name, found[0][1], tensor.shape, shapes[name])
    for key, unused in names.unused_tensors().items():
        published[key] = unused.make()
        report.filled[key] = f"{unused.reason}; the published class has it"
    report.missing = [name for name in shapes if name not in state]
    return published, report


def _our_shapes(names: PublishedNames) -> dict[str, torch.Size | None]:
    """Every tensor our model has, with its shape; None where Detectron2 decides it (numbers of classes)."""
    backbone = model_shapes(names.config) if names.config is not None else {}
    prefixed = {names.ours_prefix + name: shape for name, shape in backbone.items()}
    return prefixed | dict.fromkeys(names.head_tensors())


def _join(
    converted: dict[str, Tensor],
    report: ConversionReport,
    name: str,
    parts: Mapping[int, Tensor],
    want: torch.Size,
) -> None:
    """Puts a tensor together that is published in parts; one of which some are missing stays missing."""
    if len(parts) < PARTS:
        return
    shapes = {tuple(part.shape) for part in parts.values()}
    if len(shapes) > 1:
        report.mismatched[name] = f"shapes {', '.join(map(str, shapes))} of its parts in the file, expected equal ones"
        return
    converted[name] = torch.cat([parts[i] for i in range(PARTS)])
    if converted[name].shape != want:
        report.mismatched[name] = f"shape {tuple(converted[name].shape)} in the file, {tuple(want)} in the model"


def _account(report: ConversionReport, name: str, rule: Rule, have: torch.Size, want: torch.Size | None) -> None:
    if want is not None and have != want:
        report.mismatched[name] = f"shape {tuple(have)} in the file, {tuple(want)} in the model"
    if rule.change is not Change.NONE:
        report.note(rule.change.value)


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None, report: ConversionReport) -> dict[str, Tensor]:
    if dtype is None:
        return state
    found = Counter(t.dtype for t in state.values() if t.is_floating_point() and t.dtype != dtype)
    for other, count in found.items():
        report.notes.append(f"{count} tensors cast from {other} to {dtype}")
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
