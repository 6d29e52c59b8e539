"""The name map: our state dict against that of the published models.

Every correspondence is written once, as a pair (ours, published), and both directions follow from it. `PublishedNames`
puts the pairs together for one configuration: number and kind of the branches, interaction graph, form of merging.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ClassifierConfig, MergingConfig, PIIPConfig
from .branch_names import Unused, branch_rules, unused_branch_tensors
from .head_names import HEADS
from .rules import Change, Rule, RuleTable, rename_parts

__all__ = ["PublishedNames", "injection_rules", "projector_rules", "unit_rules"]

# One direction of an interaction unit; published names are below `branch2to1_injector` or `branch1to2_injector`
_INJECTION = rename_parts(
    "query_norm.*",
    ("value_norm.*", "feat_norm.*"),
    # deformable: sampling_offsets, attention_weights, value_proj, output_proj; regular: wq, wk, wv, proj
    "attn.*.*",
    "ffn_norm.*",
    "ffn.fc1.*",
    ("ffn.dwconv.*", "ffn.dwconv.dwconv.*"),
    "ffn.fc2.*",
)

# In a published unit "1" is the branch with the lower number, whichever two branches it joins
_DIRECTIONS = {"into_low": "branch2to1", "into_high": "branch1to2"}

# Below the classifier on both sides: heads of the branches, or the merged one
_HEADS = {
    "separate": rename_parts(("head.norms.*.*", "branch*.norm.*"), ("head.classifiers.*.*", "branch*.head.*")),
    "merged": (
        *rename_parts(("head.projections.1.0.*", "merge_branch1.*"), ("head.weights.1", "w1")),
        *rename_parts(*((f"head.projections.*.{i}.*", f"merge_branch*.{2 * i}.*") for i in (0, 2))),
        Rule("head.projections.*.1.weight", "merge_branch*.2.weight", Change.POINTWISE_KERNEL),
        *rename_parts(("head.projections.*.1.bias", "merge_branch*.2.bias")),
        *(Rule(f"head.weights.{number}", f"w{number}") for number in range(2, 5)),
        *rename_parts(("head.norm.*", "cls_norm.*"), ("head.classifier.*", "cls_head.*")),
    ),
}

# Stride of the map that a published module makes: fpn1, fpn2 (up1, up2 in single-branch baselines)
_PYRAMID_MODULES = {4: "1", 8: "2"}


def injection_rules(scale: str = "gamma") -> tuple[Rule, ...]:
    """Rules for one direction, below `into_low` (ours) and the injector (published)."""
    return (*_INJECTION, *rename_parts(("attn_gamma", f"ca_{scale}"), ("ffn_gamma", f"cffn_{scale}")))


def unit_rules(scale: str = "gamma") -> Iterator[Rule]:
    """Rules for one interaction unit, relative to the unit on both sides."""
    for ours, published in _DIRECTIONS.items():
        yield Rule(f"{ours}.proj.*", f"{published}_proj.*")
        for rule in injection_rules(scale):
            yield rule.prefixed(f"{ours}.", f"{published}_injector.")


def projector_rules(num_branches: int, norm: str) -> tuple[Rule, ...]:
    """Rules for `TokenMerging` with the given norm, below a published projector."""
    if norm == "none":  # LLaVA-1.5
        return rename_parts(("projections.1.linear_1.*", "0.*"), ("projections.1.linear_2.*", "2.*"))
    layers = {"group": {"linear_1": 1, "norm": 3, "linear_2": 6}, "layer": {"linear_1": 1, "linear_2": 5}}[norm]
    return rename_parts(
        *(
            (f"projections.{number}.{ours}.*", f"branch{number}.{published}.*")
            for number in range(1, num_branches + 1)
            for ours, published in layers.items()
        )
    )


@dataclass(frozen=True)
class PublishedNames:
    """The complete name map for one configuration.

    Args:
        config: The backbone or classifier; None for files with nothing but heads.
        branch_classes: Published class of each branch (a key of `BRANCH_CLASSES`).
        detector: What follows the backbone (a key of `HEADS`); None for nothing.
        ours_prefix: Where our model holds the backbone.
        published_prefix: Where the published model holds the backbone.
        scale: What the scales of an interaction's residuals are called.
    """

    config: PIIPConfig | ClassifierConfig | None
    branch_classes: tuple[str, ...] = ()
    detector: str | None = None
    ours_prefix: str = ""
    published_prefix: str = ""
    scale: str = "gamma"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, to store in a converted file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = None if self.config is None else self.config.to_dict()
        return fields | {"config": config, "branch_classes": list(self.branch_classes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PublishedNames:
        """Inverse of `to_dict`."""
        config = data["config"]
        if config is not None:
            config = (ClassifierConfig if "pyramid" in config else PIIPConfig).from_dict(config)
        return cls(**{**data, "config": config, "branch_classes": tuple(data["branch_classes"])})

    @property
    def pyramid(self) -> PIIPConfig | None:
        """The backbone, or that of the classifier."""
        return self.config.pyramid if isinstance(self.config, ClassifierConfig) else self.config

    def table(self) -> RuleTable:
        """All rules, with the prefixes of both sides."""
        backbone = (rule.prefixed(self.ours_prefix, self.published_prefix) for rule in self._backbone_rules())
        return RuleTable([*backbone, *(HEADS[self.detector].rules if self.detector else ())])

    def head_tensors(self) -> tuple[str, ...]:
        """Our name of every tensor of the detector outside the backbone."""
        return HEADS[self.detector].tensors() if self.detector else ()

    def unused_tensors(self) -> dict[str, Unused]:
        """Tensors that published files hold although the network needs none of them, by name."""
        if self.config is None:
            return {}
        found: dict[str, Unused] = {}
        for number, branch_class in enumerate(self.branch_classes, 1):
            prefix = self._branch_prefix(number)
            network = self.pyramid.branches[number - 1].network
            found |= {prefix + name: unused for name, unused in unused_branch_tensors(branch_class, network).items()}
        found |= self._unused_upsampling()
        return {self.published_prefix + name: unused for name, unused in found.items()}

    def _unused_upsampling(self) -> dict[str, Unused]:
        """The three-branch class keeps the four-fold upsampling even where no stride-4 map is asked for (`is_dino`)."""
        merging = self.pyramid.merging
        if len(self.pyramid.branches) != 3 or merging is None or merging.kind != "simple" or 4 in merging.out_strides:
            return {}
        dim = self.pyramid.branches[0].network.dims[-1]
        vectors = {f"fpn1.{i}.{part}": (dim,) for i, part in ((0, "bias"), (1, "weight"), (1, "bias"), (3, "bias"))}
        kernels = {f"fpn1.{i}.weight": (dim, dim, 2, 2) for i in (0, 3)}
        return {name: Unused(shape) for name, shape in {**vectors, **kernels}.items()}

    def _branch_prefix(self, number: int) -> str:
        return "" if len(self.pyramid.branches) == 1 else f"branch{number}."

    def _backbone_rules(self) -> Iterator[Rule]:
        if self.config is None:
            return
        single = len(self.pyramid.branches) == 1
        for number, branch_class in enumerate(self.branch_classes, 1):
            for rule in branch_rules(branch_class, self.pyramid.branches[number - 1].network):
                yield rule.prefixed(f"pyramid.branches.{number - 1}.model.", self._branch_prefix(number))
        for low, high in self._unit_pairs():
            for rule in unit_rules(scale=self.scale):
                yield rule.prefixed(
                    f"pyramid.interactions.*.units.{low}_{high}.", f"interactions.*.interaction_units_{low}{high}."
                )
        if isinstance(self.config, ClassifierConfig):
            yield from _HEADS[self.config.head]
        elif self.config.merging is not None:
            yield from _merging_rules(self.config.merging, self.config.merging_branches, single)

    def _unit_pairs(self) -> list[tuple[int, int]]:
        n = len(self.pyramid.branches)
        graphs = (self.pyramid.interaction.graph(k, n) for k in range(self.pyramid.num_interactions))
        return sorted({(spec.low, spec.high) for graph in graphs for spec in graph})


def _merging_rules(merging: MergingConfig, branches: Sequence[int], single: bool) -> Iterator[Rule]:
    if not single:
        for number in branches:
            yield Rule(f"merging.final.projections.{number}.*.*", f"merge_branch{number}.*.*")
            yield Rule(f"merging.final.weights.{number}", f"w{number}")
            for j, k in enumerate(merging.intermediate_after):
                ours, published = f"merging.intermediate.{j}", f"intermediate_merging_{k}"
                yield Rule(f"{ours}.projections.{number}.*.*", f"{published}_branch{number}.*.*")
                yield Rule(f"{ours}.weights.{number}", f"{published}_w{number}")
    module = "up" if single else "fpn"
    for stride, name in _PYRAMID_MODULES.items():
        yield Rule(f"feature_pyramid.levels.{stride}.*.*", f"{module}{name}.*.*")
