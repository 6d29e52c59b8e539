"""PIIP as an image classifier, with the methods that timm's models have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from timm.layers import RmsNorm
from torch import Tensor, nn

from .branches import BranchState
from .classifier_config import ClassifierConfig
from .config import BranchConfig, PIIPConfig
from .merging import LAYER_NORM_EPS, ClassificationHeads, ClassificationMerging
from .pyramid import PIIP

__all__ = ["PIIPClassifier"]


class PIIPClassifier(nn.Module):
    """Pyramid and classification head (paper sections III-C and IV-D).

    Args:
        config: Branches, interactions and head.

    Attributes:
        num_classes: Number of classes; 0 without classifier.
        num_features: Width of the pooled features: of all branches together for separate heads, of Branch 1 for a
            merged one.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        reads_class_tokens = config.head == "separate" and config.pooling == "class_token"
        self.pyramid = PIIP(_without_idle_interaction(config.pyramid) if reads_class_tokens else config.pyramid)
        dims = self.pyramid.dims
        if config.head == "separate":
            norms = [_final_norm(branch) for branch in config.pyramid.branches]
            self.head = ClassificationHeads(norms, dims, config.num_classes, drop_rate=config.drop_rate)
        else:
            self.head = ClassificationMerging(
                dims,
                config.num_classes,
                num_groups=config.num_groups,
                grid=config.pyramid.largest_image,
                drop_rate=config.drop_rate,
            )
        self.num_features = self.head_hidden_size = self.head.num_features

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of an image (B, 3, H, W) at the largest resolution, usually `config.image_size`."""
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> list[BranchState]:
        """Final state of every branch: its map, channels last, (B, H_i, W_i, C_i), and its class token (B, 1, C_i)."""
        return self.pyramid.forward_states(image)[0]

    def forward_head(self, states: Sequence[BranchState], pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from `forward_features`; with `pre_logits` the pooled features (B, num_features)."""
        if self.config.head == "merged":
            return self.head([state.tokens.permute(0, 3, 1, 2) for state in states], pre_logits=pre_logits)
        return self.head([self._read(state) for state in states], pre_logits=pre_logits)

    def _read(self, state: BranchState) -> Tensor:
        """The tokens (B, N, C) that the head of a branch reads."""
        if self.config.pooling == "class_token":
            return state.prefix[:, :1]
        patches = state.tokens.flatten(1, 2)
        return patches[:, :1] if self.config.pooling == "first_patch" else patches

    def get_classifier(self) -> nn.Module:
        """The linear classifiers: a `ModuleDict` by branch number for separate heads, one linear for a merged one."""
        return self.head.classifiers if self.config.head == "separate" else self.head.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifiers by new ones; 0 classes: by none, so that `forward` gives pooled features."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.head.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of blocks and interactions in the backward pass instead of keeping them."""
        self.pyramid.set_grad_checkpointing(enable)


def _without_idle_interaction(config: PIIPConfig) -> PIIPConfig:
    """Without an interaction behind the last blocks: it changes patch tokens alone, and class tokens never see it."""
    count = config.num_interactions
    segments = [config.segments(number) for number in range(1, len(config.branches) + 1)]
    pairs = list(zip(config.branches, segments, strict=True))
    if count == 0 or any(found[-1][1] + 1 < branch.network.depth for branch, found in pairs):
        return config
    return dataclasses.replace(
        config,
        branches=tuple(dataclasses.replace(branch, segments=found[:-1]) for branch, found in pairs),
        interaction=dataclasses.replace(config.interaction, num_interactions=count - 1),
    )


def _final_norm(branch: BranchConfig) -> nn.Module:
    """The norm before the head of a branch's network."""
    network = branch.network
    norm = RmsNorm if getattr(network, "norm", None) == "rmsnorm" else nn.LayerNorm
    return norm(network.dims[-1], eps=getattr(network, "norm_eps", LAYER_NORM_EPS))
