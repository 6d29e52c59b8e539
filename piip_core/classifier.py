"""PIIP as an image classifier, with the methods that timm's models have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

from timm.layers import Format, RmsNorm, nchw_to
from torch import Tensor, nn

from .branches import BranchState
from .config import BranchConfig, ClassifierConfig, PIIPConfig, Pooling
from .errors import ConfigError, check, check_choice
from .merging import LAYER_NORM_EPS, ClassificationHeads, ClassificationMerging
from .pyramid import PIIP, DensePIIP, ParameterLayers, to_maps
from .recompute import GradCheckpointing

# timm's names of what a head reads; the first patch has none there
_POOLINGS: dict[str, Pooling] = {"token": "class_token", "avg": "average", "first_patch": "first_patch"}
_PYRAMID = "pyramid."


def with_pooling(config: ClassifierConfig, global_pool: str) -> ClassifierConfig:
    """The configuration with `pooling` by timm's name: "token", "avg" or, unknown to timm, "first_patch".

    Raises:
        ConfigError: For any other name, or one that is not possible for the branches or the head.
    """
    check_choice("global_pool", global_pool, tuple(_POOLINGS))
    if config.head == "merged":
        check(global_pool == "avg", "global_pool", global_pool, "'avg': a merged head averages")
        return config
    return dataclasses.replace(config, pooling=_POOLINGS[global_pool])


def feature_maps(config: PIIPConfig) -> list[dict[str, Any]]:
    """All maps of a pyramid, from the finest to the coarsest, as timm describes the features of a model.

    For branches of one stride each, as ViTs are, that is branch by branch, the one with the largest image first, and
    inside a branch from its first interaction to its end.

    Returns:
        For each map timm's `num_chs`, `reduction` (a fraction where the branch shrinks the image by one) and `module`;
        the number of its `branch`, from 1; after which `interaction` it is, from 0, None for after the blocks that
        follow the last one; and whether it is the `final` one of its branch.
    """
    found = []
    for number, branch in sorted(enumerate(config.branches, 1), key=lambda pair: -pair[1].image_size):
        segments = config.segments(number)
        points: list[int | None] = list(range(config.num_interactions))
        if not segments or segments[-1][1] + 1 < branch.network.depth:
            points.append(None)
        for point in points:
            reduction = config.strides_after(point)[number - 1] * config.image_size / branch.image_size
            module = f"branches.{number - 1}" if point is None else f"interactions.{point}"
            info = {
                "num_chs": config.dims_after(point)[number - 1],
                "reduction": int(reduction) if reduction.is_integer() else reduction,
                "module": _PYRAMID + module,
                "branch": number,
                "interaction": point,
                "final": point == points[-1],
            }
            found.append(info)
    return sorted(found, key=lambda info: info["reduction"])


class PIIPClassifier(nn.Module):
    """Pyramid and classification head (paper sections III-C and IV-D).

    Attributes:
        num_classes: Number of classes; 0 without classifier.
        in_chans: Channels of the image, as timm calls it.
        num_features: Width of the pooled features: of all branches together for separate heads, of Branch 1 for a
            merged one. Also `head_hidden_size`, as timm calls it.
        feature_info: The maps that `forward_intermediates` gives, as in `feature_maps`.
        unpooled: Whether `forward` gives maps, timm's `global_pool=""`: those of the branches, (B, C_i, H_i, W_i), with
            the norms of separate heads, or the one of a merged head. `forward_features` gives maps, too, then.
    """

    head: ClassificationHeads | ClassificationMerging

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.in_chans, self.unpooled = 3, False
        self.num_classes = config.num_classes
        self.pyramid = PIIP(_pyramid_of(config))
        self.feature_info = feature_maps(self.pyramid.config)
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

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes) of an image (B, 3, H, W) at the largest resolution, usually `config.image_size`."""
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> list[BranchState] | list[Tensor]:
        """Final state of every branch: its map, channels last, (B, H_i, W_i, C_i), and its class token (B, 1, C_i)."""
        return self._features(self.pyramid.forward_states(image)[0])

    def _features(self, states: list[BranchState]) -> list[BranchState] | list[Tensor]:
        return to_maps(states) if self.unpooled else states

    def forward_head(self, features: Sequence[Any], pre_logits: bool = False) -> Tensor | list[Tensor]:
        """Logits (B, num_classes) from `forward_features`; with `pre_logits` the pooled features (B, num_features)."""
        if self.unpooled:
            return self.head.forward_maps(features)
        return self.head(head_inputs(self.config, features), pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """The linear classifiers: a `ModuleDict` by branch number for separate heads, one linear for a merged one."""
        return self.head.classifiers if isinstance(self.head, ClassificationHeads) else self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers by new ones; 0 classes: by none, so that `forward` gives pooled features.

        With `global_pool` the heads read something else from now on, as in `with_pooling`. Class tokens never see an
        interaction after the last blocks, so it goes, and comes (new) with other poolings. "" makes it `unpooled`.

        Raises:
            ConfigError: If `global_pool` is unknown, or not possible for the branches, the head or the classes.
        """
        unpooled = global_pool == "" or (self.unpooled and global_pool is None)
        check(not (unpooled and num_classes), "num_classes", num_classes, "0 with global_pool='', for maps")
        config = with_pooling(self.config, global_pool) if global_pool else self.config
        self.unpooled = unpooled
        self.config = dataclasses.replace(config, num_classes=num_classes)
        self.num_classes = num_classes
        self.head.reset_classifier(num_classes)
        self._adopt(self.get_classifier())
        if global_pool:
            self.pyramid.set_interactions(_pyramid_of(self.config))
            self._adopt(self.pyramid.interactions)
            self.feature_info = feature_maps(self.pyramid.config)

    def _adopt(self, module: nn.Module) -> None:
        """Brings a new part to the device, dtype and mode of the model."""
        parameter = next(self.pyramid.branches[0].parameters())
        module.to(parameter.device, parameter.dtype).train(self.training)

    @property
    def global_pool(self) -> str:
        """What the heads read, as in `with_pooling`; "" for nothing."""
        if self.unpooled:
            return ""
        pooling = self.config.pooling if self.config.head == "separate" else "average"
        return next(name for name, value in _POOLINGS.items() if value == pooling)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor | None]] | tuple[list[BranchState] | list[Tensor], list[Any]]:
        """Final states as from `forward_features` (with `stop_early`, where it ended), and maps on the way there.

        Args:
            x: Image (B, 3, H, W).
            indices: Which of `feature_info`, in that order; the last n for an integer; None for all.
            return_prefix_tokens: Give pairs of a map and its class tokens (B, P, C), None for a branch without any.
            norm: Apply the norm before the head of the map's branch.
            stop_early: End after the last interaction that is needed.
            output_fmt: "NCHW", "NHWC", "NCL" or "NLC".
            intermediates_only: Leave out the final states, and end after the last interaction that is needed.

        Raises:
            ConfigError: If there is no such map, or `norm` does not fit it.
        """
        wanted = [self.feature_info[i] for i in _resolve_indices(len(self.feature_info), indices)]
        norms = [self._norm_of(info) if norm else nn.Identity() for info in wanted]
        points = {info["interaction"] for info in wanted}
        early = (stop_early or intermediates_only) and None not in points
        final, found = self.pyramid.forward_states(x, points - {None}, stop_early=early)
        maps = []
        for info, normalise in zip(wanted, norms, strict=True):
            states = final if info["interaction"] is None else found[info["interaction"]]
            tokens, prefix, _ = states[info["branch"] - 1]
            fitted = nchw_to(normalise(tokens).permute(0, 3, 1, 2).contiguous(), Format(output_fmt))
            prefix = None if prefix is None else normalise(prefix)
            maps.append((fitted, prefix) if return_prefix_tokens else fitted)
        return maps if intermediates_only else (self._features(final), maps)

    def _norm_of(self, info: dict[str, Any]) -> nn.Module:
        if isinstance(self.head, ClassificationMerging):
            raise ConfigError("norm=True: expected False: a merged head has no norm of a single branch")
        number, dim = info["branch"], info["num_chs"]
        width = self.pyramid.dims[number - 1]
        check(dim == width, "norm", True, f"False for a map of {dim} channels: the norm has {width}")
        return self.head.norms[str(number)]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes pooling, classifiers, and norms of separate heads from what gives maps; blocks and interactions stay.

        Returns the indices, as `forward_intermediates` has them.
        """
        if prune_head:
            self.reset_classifier(0, "")
        if prune_norm and isinstance(self.head, ClassificationHeads):
            self.head.norms = nn.ModuleDict({number: nn.Identity() for number in self.head.norms})
        return _resolve_indices(len(self.feature_info), indices)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Layer of a parameter by its name, for timm's layer-wise learning-rate decay; see `ParameterLayers`.

        Fractional layers are rounded down. The published training gives interactions and heads the full rate. Layers
        are not grouped any further by `coarse`.
        """
        layers = ParameterLayers(self.pyramid)

        def layer_of(name: str) -> int:
            return int(layers(name.removeprefix(_PYRAMID))) if name.startswith(_PYRAMID) else layers.last

        return layer_of

    def no_weight_decay(self) -> set[str]:
        """Names of the tables and tokens that timm's networks do not decay."""
        found: set[str] = set()
        for index, branch in enumerate(self.pyramid.branches):
            names: set[str] = getattr(branch.model, "no_weight_decay", set)()
            found |= {f"{_PYRAMID}branches.{index}.model.{name}" for name in names}
        return found & {name for name, _ in self.named_parameters()}

    def set_grad_checkpointing(self, enable: GradCheckpointing = True) -> None:
        """Recomputes activations of blocks and interactions in the backward pass; see `GradCheckpointing`."""
        self.pyramid.set_grad_checkpointing(enable)


def build_model(config: PIIPConfig | ClassifierConfig) -> PIIP | DensePIIP | PIIPClassifier:
    """A classifier, a dense backbone, or without `merging` the pyramid alone; weights are random."""
    if isinstance(config, ClassifierConfig):
        return PIIPClassifier(config)
    return PIIP(config) if config.merging is None else DensePIIP(config)


def head_inputs(config: ClassifierConfig, states: Sequence[BranchState]) -> list[Tensor]:
    """What the head reads of each branch: tokens (B, N, C) of separate heads, a map (B, C, H, W) of a merged one."""
    if config.head == "merged":
        return [state.tokens.permute(0, 3, 1, 2) for state in states]
    if config.pooling == "class_token":
        return [cast(Tensor, state.prefix)[:, :1] for state in states]  # as `ClassifierConfig` has checked
    patches = [state.tokens.flatten(1, 2) for state in states]
    return [tokens[:, :1] for tokens in patches] if config.pooling == "first_patch" else patches


def _resolve_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """The indices of some of `count` maps in timm's manner: None for all, an integer for the last ones."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        check(0 < last <= count, "indices", indices, f"a number of maps from 1 to {count}")
        return list(range(count - last, count))
    wrong = [index for index in indices if not -count <= index < count]
    check(not wrong, "indices", wrong, f"indices from {-count} to {count - 1}, of {count} maps")
    return [index % count for index in indices]


def _pyramid_of(config: ClassifierConfig) -> PIIPConfig:
    """The pyramid as the head needs it: class tokens never see an interaction after the last blocks, so it goes."""
    pyramid, count = config.pyramid, config.pyramid.num_interactions
    if config.head == "merged" or config.pooling != "class_token" or count == 0:
        return pyramid
    pairs = [(branch, pyramid.segments(number)) for number, branch in enumerate(pyramid.branches, 1)]
    if any(found[-1][1] + 1 < branch.network.depth for branch, found in pairs):
        return pyramid
    return dataclasses.replace(
        pyramid,
        branches=tuple(dataclasses.replace(branch, segments=found[:-1]) for branch, found in pairs),
        interaction=dataclasses.replace(pyramid.interaction, num_interactions=count - 1),
    )


def _final_norm(branch: BranchConfig) -> nn.Module:
    """The norm before the head of a branch's network."""
    network = branch.network
    norm = RmsNorm if getattr(network, "norm", None) == "rmsnorm" else nn.LayerNorm
    return norm(network.dims[-1], eps=getattr(network, "norm_eps", LAYER_NORM_EPS))
