"""The name map between our model and a published one: vision tower, projectors, language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from piip_core import PIIPConfig
from piip_core.checkpoints import ConversionReport, PublishedNames, from_published, to_published
from piip_core.checkpoints.branch_names import branch_class_of
from piip_core.checkpoints.lazy import LazyState, LazyTensor
from piip_core.checkpoints.names import projector_rules
from piip_core.checkpoints.public_config import branch_shapes
from piip_core.checkpoints.rules import RuleTable

__all__ = ["PUBLISHED_PROJECTOR", "PUBLISHED_TOWER", "LlavaNames"]

PUBLISHED_TOWER, PUBLISHED_PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
OUR_TOWER, OUR_PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
# Language model: names in a Llama of transformers, and where ours has it. The head is called the same.
PUBLISHED_DECODER, OUR_DECODER, HEAD = "model.", "model.language_model.", "lm_head."


@dataclass(frozen=True)
class LlavaNames:
    """The complete name map of one model.

    Args:
        vision: Branches and interactions.
        branch_classes: Published class of each branch; see `piip_core.checkpoints`.
        projector_norm: Norm inside the projectors.
    """

    vision: PIIPConfig
    branch_classes: tuple[str, ...]
    projector_norm: str = "group"

    @classmethod
    def of_published(cls, keys: Iterable[str], vision: PIIPConfig, projector_norm: str = "group") -> LlavaNames:
        """The map for a published file, whose keys tell the classes of the branches."""
        tower = {key.removeprefix(PUBLISHED_TOWER): () for key in keys if key.startswith(PUBLISHED_TOWER)}
        numbers = range(1, len(vision.branches) + 1)
        classes = tuple(branch_class_of(list(branch_shapes(tower, number))) for number in numbers)
        return cls(vision, classes, projector_norm)

    @property
    def _tower(self) -> PublishedNames:
        return PublishedNames(self.vision, self.branch_classes, scale="weight")

    @property
    def _projector(self) -> RuleTable:
        rules = projector_rules(len(self.vision.branches), self.projector_norm)
        return RuleTable(rule.prefixed(OUR_PROJECTOR, PUBLISHED_PROJECTOR) for rule in rules)

    def to_ours(
        self, state: LazyState, shapes: Mapping[str, torch.Size], *, source: str
    ) -> tuple[LazyState, ConversionReport]:
        """A published state dict in our names; the language model's tensors are not read.

        Args:
            state: The published one.
            shapes: Name and shape of every tensor of our model.
            source: Name of the file, for messages.
        """
        entries: dict[str, LazyTensor] = {}
        report = ConversionReport(source=source)
        tower: dict[str, LazyTensor] = {}
        table = self._projector
        for key, entry in state.entries.items():
            if key.startswith(PUBLISHED_TOWER):
                tower[key.removeprefix(PUBLISHED_TOWER)] = entry
                continue
            name = _decoder_name(key) if not key.startswith(PUBLISHED_PROJECTOR) else (table.to_ours(key) or (None,))[0]
            if name not in shapes:
                report.unexplained.append(key)
                continue
            entries[name] = entry
            report.used[key] = name
            if entry.shape != shapes[name]:
                report.mismatched[name] = f"shape {tuple(entry.shape)} in the file, {tuple(shapes[name])} in the model"
        entries |= self._tower_to_ours(tower, report)
        report.missing = [name for name in shapes if name not in entries]
        return LazyState({name: entries[name] for name in shapes if name in entries}), report

    def _tower_to_ours(self, tower: Mapping[str, LazyTensor], report: ConversionReport) -> dict[str, LazyTensor]:
        found, inner = from_published(LazyState(tower), self.vision, names=self._tower, dtype=None)
        report.used |= {PUBLISHED_TOWER + key: OUR_TOWER + name for key, name in inner.used.items()}
        report.ignored |= {PUBLISHED_TOWER + key: reason for key, reason in inner.ignored.items()}
        report.unexplained += [PUBLISHED_TOWER + key for key in inner.unexplained]
        report.mismatched |= {OUR_TOWER + name: text for name, text in inner.mismatched.items()}
        report.notes += inner.notes
        return {OUR_TOWER + name: LazyTensor.of(tensor) for name, tensor in found.items()}

    def to_published(self, state: LazyState, *, source: str) -> tuple[LazyState, ConversionReport]:
        """Our state dict in the published names; the reverse of `to_ours`."""
        entries: dict[str, LazyTensor] = {}
        report = ConversionReport(source=source)
        tower: dict[str, Tensor] = {}
        table = self._projector
        for name, entry in state.entries.items():
            if name.startswith(OUR_TOWER):
                tower[name.removeprefix(OUR_TOWER)] = entry.load()
                continue
            key = (table.to_published(name) or (None,))[0]
            if name.startswith(OUR_DECODER):
                key = PUBLISHED_DECODER + name.removeprefix(OUR_DECODER)
            elif name.startswith(HEAD):
                key = name
            if key is None:
                report.unexplained.append(name)
                continue
            entries[key] = entry
            report.used[name] = key
        published, inner = to_published(tower, self._tower)
        dtype = next(iter(tower.values())).dtype
        entries |= {PUBLISHED_TOWER + key: LazyTensor.of(tensor.to(dtype)) for key, tensor in published.items()}
        report.used |= {OUR_TOWER + name: PUBLISHED_TOWER + key for name, key in inner.used.items()}
        report.filled |= {PUBLISHED_TOWER + key: reason for key, reason in inner.filled.items()}
        report.unexplained += [OUR_TOWER + name for name in inner.unexplained]
        report.missing = [OUR_TOWER + name for name in inner.missing]
        return LazyState(entries), report


def _decoder_name(key: str) -> str | None:
    if key.startswith(PUBLISHED_DECODER):
        return OUR_DECODER + key.removeprefix(PUBLISHED_DECODER)
    return key if key.startswith(HEAD) else None
