"""The name map between our model and a published one: vision tower, projectors, language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from piip_core.checkpoints import PublishedNames
from piip_core.checkpoints.branch_names import branch_classes_of
from piip_core.checkpoints.names import NameMap, projector_rules
from piip_core.checkpoints.rules import Rule, RuleTable, rename_parts
from piip_core.meta import on_meta

from ..configuration import PIIPLlavaConfig
from ..modeling import PIIPLlavaForConditionalGeneration

PUBLISHED_TOWER, PUBLISHED_PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
OUR_TOWER, OUR_PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
# In a Llama of transformers, and where ours has it
_DECODER = rename_parts(
    *((f"model.language_model.{name}", f"model.{name}") for name in ("*.weight", "layers.*.*.*", "layers.*.*.*.*")),
    "lm_head.*",
)


@dataclass(frozen=True)
class LlavaNames(PublishedNames):
    """The complete name map of one model: that of its vision tower, with projectors and language model.

    Args:
        model: Configuration of our model.
    """

    model: PIIPLlavaConfig | None = None

    @classmethod
    def of(cls, model: PIIPLlavaConfig, branch_classes: Sequence[str]) -> LlavaNames:
        """The map for a model, with the published class of each branch; see `piip_core.checkpoints`."""
        return cls(
            model.vision_config.piip,
            tuple(branch_classes),
            ours_prefix=OUR_TOWER,
            published_prefix=PUBLISHED_TOWER,
            scale="weight",
            model=model,
        )

    @classmethod
    def of_published(cls, keys: Iterable[str], model: PIIPLlavaConfig) -> LlavaNames:
        """The map for a published file, whose keys tell the classes of the branches."""
        tower = [key.removeprefix(PUBLISHED_TOWER) for key in keys if key.startswith(PUBLISHED_TOWER)]
        return cls.of(model, branch_classes_of(tower, len(model.vision_config.piip.branches)))

    def table(self) -> RuleTable:
        """All rules."""
        projector = projector_rules(len(self.branch_classes), self.model.projector_norm)
        projector = (rule.prefixed(OUR_PROJECTOR, PUBLISHED_PROJECTOR) for rule in projector)
        return RuleTable([*super().table().rules, *projector, *_DECODER])

    def shapes(self) -> Mapping[str, torch.Size]:
        """Name and shape of every tensor of our model, without allocating it."""
        with on_meta():
            model = PIIPLlavaForConditionalGeneration(self.model)
        tied = set(model.all_tied_weights_keys)
        return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


@dataclass(frozen=True)
class ProjectorNames(NameMap):
    """The name map of projectors alone, to those of `TokenMerging`."""

    rules: tuple[Rule, ...]

    def table(self) -> RuleTable:
        """All rules."""
        return RuleTable(rule.prefixed("", PUBLISHED_PROJECTOR) for rule in self.rules)

    def shapes(self) -> Mapping[str, torch.Size | None]:
        """Names of all tensors, of any shape."""
        return {rule.ours.replace("*", part): None for rule in self.rules for part in ("weight", "bias")}
