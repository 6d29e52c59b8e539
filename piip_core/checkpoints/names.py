"""The name map: our state dict against that of the published models.

Every correspondence is written once, as a pair (ours, published), and both directions follow from it. `PublishedNames`
puts the pairs together for one configuration: number and kind of the branches, interaction graph, form of merging.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..classifier import build_model
from ..config import BranchConfig, ClassifierConfig, MergingConfig, PIIPConfig
from ..errors import CheckpointError
from ..meta import on_meta
from ..pyramid import PIIP
from .branch_names import (
    branch_classes_of,
    branch_prefix,
    branch_rules,
    default_branch_class,
    unused_branch_tensors,
)
from .head_names import HEADS
from .rules import POINTWISE_KERNEL, SCALAR, Rule, RuleTable, rename_parts

PUBLISHED_BACKBONE = "backbone."
"""Where published models hold the backbone."""

# One direction of an interaction unit; published names are below `branch2to1_injector` or `branch1to2_injector`
_INJECTION = rename_parts(
    "query_norm.*",
    ("value_norm.*", "feat_norm.*"),
    # deformable: sampling_offsets, attention_weights, value_proj, output_proj; regular: wq, wk, wv, proj
    "attn.*.*",
    "ffn_norm.*",
    ("ffn.dwconv.*", "ffn.dwconv.dwconv.*"),
    "ffn.fc*.*",
)

# Below the classifier on both sides: heads of the branches, or the merged one
_HEADS = {
    "separate": rename_parts(("head.norms.*.*", "branch*.norm.*"), ("head.classifiers.*.*", "branch*.head.*")),
    "merged": (
        Rule("head.projections.*.1.weight", "merge_branch*.2.weight", POINTWISE_KERNEL),
        *rename_parts(
            ("head.projections.1.0.*", "merge_branch1.*"),
            *((f"head.projections.*.{i}.*", f"merge_branch*.{2 * i}.*") for i in range(3)),
            ("head.norm.*", "cls_norm.*"),
            ("head.classifier.*", "cls_head.*"),
        ),
    ),
}


def unit_rules(scale: str = "gamma") -> Iterator[Rule]:
    """Rules for one interaction unit, relative to the unit on both sides."""
    injection = (*_INJECTION, *rename_parts(("attn_gamma", f"ca_{scale}"), ("ffn_gamma", f"cffn_{scale}")))
    # In a published unit "1" is the branch with the lower number, whichever two branches it joins
    for ours, published in (("into_low", "branch2to1"), ("into_high", "branch1to2")):
        yield Rule(f"{ours}.proj.*", f"{published}_proj.*")
        for rule in injection:
            yield rule.prefixed(f"{ours}.", f"{published}_injector.")


def projector_rules(num_branches: int, norm: str) -> tuple[Rule, ...]:
    """Rules for `TokenMerging` with the given norm, below a published projector."""
    layers = {"group": {"linear_1": 1, "norm": 3, "linear_2": 6}, "layer": {"linear_1": 1, "linear_2": 5}}[norm]
    return rename_parts(
        *(
            (f"projections.{number}.{ours}.*", f"branch{number}.{published}.*")
            for number in range(1, num_branches + 1)
            for ours, published in layers.items()
        )
    )


@lru_cache(maxsize=64)  # more than the zoo has: recognising a file may need many
def model_shapes(config: PIIPConfig | ClassifierConfig) -> Mapping[str, torch.Size]:
    """Name and shape of every tensor of `DensePIIP(config)` or `PIIPClassifier(config)`, without allocating it.

    Without merging, those of a module whose `pyramid` is `PIIP(config)`.
    """
    with on_meta():
        model = build_model(config)
    prefix = "pyramid." if isinstance(model, PIIP) else ""
    return MappingProxyType({prefix + name: tensor.shape for name, tensor in model.state_dict().items()})


def pyramid_of(config: PIIPConfig | ClassifierConfig) -> PIIPConfig:
    """The backbone, or that of the classifier."""
    return config.pyramid if isinstance(config, ClassifierConfig) else config


class NameMap(Protocol):
    """What a conversion of names has to know."""

    def table(self) -> RuleTable:
        """All rules."""

    def shapes(self) -> Mapping[str, torch.Size | None]:
        """Every tensor of our model with its shape; None for any."""

    def unused_tensors(self) -> Mapping[str, Tensor]:
        """Tensors that published files hold although the network needs none of them, by published name."""
        return {}


@dataclass(frozen=True)
class PublishedNames(NameMap):
    """The complete name map for one configuration.

    Args:
        config: The backbone or classifier.
        branch_classes: Published class of each branch (a key of `BRANCH_CLASSES`).
        detector: What follows the backbone (a key of `HEADS`); None for nothing.
        ours_prefix: Where our model holds the backbone.
        published_prefix: Where the published model holds the backbone.
        scale: What the scales of an interaction's residuals are called.

    Raises:
        CheckpointError: If a classifier reads class tokens.
    """

    config: PIIPConfig | ClassifierConfig
    branch_classes: tuple[str, ...]
    detector: str | None = None
    ours_prefix: str = ""
    published_prefix: str = ""
    scale: str = "gamma"

    def __post_init__(self) -> None:
        config = self.config
        if isinstance(config, ClassifierConfig) and config.head == "separate" and config.pooling != "first_patch":
            raise CheckpointError(
                f"a classifier with pooling={config.pooling!r} has no published form: expected pooling='first_patch', "
                "and networks with class_position=False"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, to store in a converted file."""
        return {**vars(self), "config": self.config.to_dict(), "branch_classes": list(self.branch_classes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PublishedNames:
        """Inverse of `to_dict`."""
        found = {"config": config_from_dict(data["config"]), "branch_classes": tuple(data["branch_classes"])}
        return cls(**{**data, **found})

    def table(self) -> RuleTable:
        """All rules, with the prefixes of both sides."""
        backbone = (rule.prefixed(self.ours_prefix, self.published_prefix) for rule in self._backbone_rules())
        return RuleTable([*backbone, *rename_parts(*(HEADS[self.detector].published.items() if self.detector else ()))])

    def shapes(self) -> dict[str, torch.Size | None]:
        """Every tensor of our model with its shape; None where Detectron2 decides it (numbers of classes)."""
        shapes: dict[str, torch.Size | None] = dict.fromkeys(HEADS[self.detector].published if self.detector else ())
        return {self.ours_prefix + name: shape for name, shape in model_shapes(self.config).items()} | shapes

    def unused_tensors(self) -> dict[str, Tensor]:
        """See `NameMap`."""
        found = self._unused_upsampling()
        for prefix, branch_class, branch in self._branches():
            unused = unused_branch_tensors(branch_class, branch.network)
            found |= {prefix + name: tensor for name, tensor in unused.items()}
        return {self.published_prefix + name: unused for name, unused in found.items()}

    def _unused_upsampling(self) -> dict[str, Tensor]:
        """The three-branch class keeps the four-fold upsampling even where no stride-4 map is asked for (`is_dino`)."""
        pyramid = pyramid_of(self.config)
        merging = pyramid.merging
        if len(pyramid.branches) != 3 or merging is None or merging.kind != "simple" or 4 in merging.out_strides:
            return {}
        dim = pyramid.branches[0].network.dims[-1]
        kernel, vector = torch.zeros(()).expand(dim, dim, 2, 2), torch.zeros(dim)
        parts = {"0.weight": kernel, "0.bias": vector, "1.weight": vector, "1.bias": vector}
        parts |= {"3.weight": kernel, "3.bias": vector}
        return {f"fpn1.{part}": tensor for part, tensor in parts.items()}

    def _branches(self) -> Iterator[tuple[str, str, BranchConfig]]:
        """Published prefix, published class and configuration of each branch."""
        branches = pyramid_of(self.config).branches
        for number, (branch_class, branch) in enumerate(zip(self.branch_classes, branches, strict=True), 1):
            yield branch_prefix(number, len(branches)), branch_class, branch

    def _backbone_rules(self) -> Iterator[Rule]:
        for index, (prefix, branch_class, branch) in enumerate(self._branches()):
            for rule in branch_rules(branch_class, branch.network):
                yield rule.prefixed(f"pyramid.branches.{index}.model.", prefix)
        pyramid = pyramid_of(self.config)
        graphs = (pyramid.interaction.graph(k, len(pyramid.branches)) for k in range(pyramid.num_interactions))
        for low, high in sorted({(spec.low, spec.high) for graph in graphs for spec in graph}):
            ours = f"pyramid.interactions.*.units.{low}_{high}."
            for rule in unit_rules(self.scale):
                yield rule.prefixed(ours, f"interactions.*.interaction_units_{low}{high}.")
        if isinstance(self.config, ClassifierConfig):
            yield from _HEADS[self.config.head]
            if self.config.head == "merged":
                yield from _weight_rules("head.weights", "w", range(1, len(pyramid.branches) + 1))
        elif self.config.merging is not None:
            yield from _merging_rules(self.config.merging, self.config.merging_branches, len(self.config.branches) == 1)


def _merging_rules(merging: MergingConfig, branches: Sequence[int], single: bool) -> Iterator[Rule]:
    if not single:
        # Where ours and the published model have a merging: "final" and those after interactions
        mergings = {"merging.final": ("merge", "")}
        for j, k in enumerate(merging.intermediate_after):
            mergings[f"merging.intermediate.{j}"] = (f"intermediate_merging_{k}", f"intermediate_merging_{k}_")
        for ours, (published, weights) in mergings.items():
            for number in branches:
                yield Rule(f"{ours}.projections.{number}.*.*", f"{published}_branch{number}.*.*")
            yield from _weight_rules(f"{ours}.weights", f"{weights}w", branches)
    for number, stride in ((1, 4), (2, 8)):
        yield Rule(f"feature_pyramid.levels.{stride}.*.*", f"{'up' if single else 'fpn'}{number}.*.*")


def _weight_rules(ours: str, published: str, branches: Sequence[int]) -> Iterator[Rule]:
    for part, number in enumerate(branches):
        yield Rule(ours, f"{published}{number}", SCALAR, part=part, parts=len(branches))


def config_from_dict(data: Mapping[str, Any]) -> PIIPConfig | ClassifierConfig:
    """Whichever of the two configurations `to_dict` made it of."""
    return (ClassifierConfig if "pyramid" in data else PIIPConfig).from_dict(data)


def published_names(
    config: PIIPConfig | ClassifierConfig, keys: Collection[str], *, backbone_only: bool = False
) -> PublishedNames:
    """The name map for the backbone or classifier in a published file, by the names in it.

    With `backbone_only`, our names are relative to `DensePIIP`, not to a Detectron2 model.

    Raises:
        CheckpointError: If a classifier reads class tokens, or the file has fewer branches.
        NotSupportedYet: If a branch is of a family without a name table.
    """
    prefix = PUBLISHED_BACKBONE if any(key.startswith(PUBLISHED_BACKBONE) for key in keys) else ""
    inside = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    classes = branch_classes_of(inside, len(pyramid_of(config).branches))
    if not prefix or backbone_only:
        return PublishedNames(config, classes, published_prefix=prefix)
    detector = detector_of(keys)
    return PublishedNames(config, classes, detector, HEADS[detector or "rpn"].backbone, prefix)


def our_names(
    config: PIIPConfig | ClassifierConfig, keys: Collection[str], branch_classes: Sequence[str] | None = None
) -> PublishedNames:
    """The name map for a file of ours, of `DensePIIP`, `PIIPClassifier` or a Detectron2 model, by the names in it.

    They do not tell the published class of each branch; None takes that of `default_branch_class`.

    Raises:
        CheckpointError: If a classifier reads class tokens.
    """
    classes = tuple(branch_classes or map(default_branch_class, pyramid_of(config).branches))
    prefixes = {head.backbone for head in HEADS.values()}
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys)), None)
    if prefix is None:
        return PublishedNames(config, classes)
    return PublishedNames(config, classes, detector_of(keys, ours=True), prefix, PUBLISHED_BACKBONE)


def detector_of(keys: Collection[str], *, ours: bool = False) -> str | None:
    """The detector whose head names explain most of the keys; the smallest one of several, None if none does any."""
    known = {}
    for name, head in HEADS.items():
        known[name] = len(set(head.published if ours else head.published.values()) & set(keys))
    best = max(known, key=known.__getitem__)
    return best if known[best] else None
