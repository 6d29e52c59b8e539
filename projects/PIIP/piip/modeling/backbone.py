"""PIIP as a Detectron2 backbone, and an FPN that keeps its padding rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor, nn

from piip_core import DensePIIP, PIIPConfig
from piip_core.checkpoints import load_pretrained
from piip_core.meta import on_meta
from piip_core.ops.deconvolution import join
from piip_core.recompute import GradCheckpointing


class PIIPBackbone(Backbone):
    """A PIIP backbone (branches, interactions, merging, feature pyramid) in Detectron2's contract.

    Args:
        config (PIIPConfig): with `merging` set.
        pad_divisor (int): images are padded at the bottom and right to multiples of it. Published models were
            trained with 224 (64 for single branches): padded cells take part in window attention.
        pretrained (bool): load the weights that the branches name in `BranchConfig.pretrained`. Turn it off when a
            checkpoint of the whole model follows. Nothing is loaded on the meta device.
        use_act_checkpoint (bool | str): recompute activations in the backward pass to save memory; "cheap" recomputes
            interactions, and of blocks all but matrix products, convolutions and self-attention.
    """

    def __init__(
        self,
        config: PIIPConfig,
        *,
        pad_divisor: int,
        pretrained: bool = True,
        use_act_checkpoint: GradCheckpointing = False,
    ) -> None:
        super().__init__()
        self.features = DensePIIP(config)
        self._pad_divisor = pad_divisor
        self._shapes = _shapes(self.features)
        largest = max(self.features.out_strides)
        if pad_divisor % largest:
            raise ValueError(f"pad_divisor={pad_divisor}: expected a multiple of the largest output stride {largest}")
        self.features.set_grad_checkpointing(use_act_checkpoint)
        if pretrained and not next(self.parameters()).is_meta:
            load_pretrained(self.features.pyramid)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps "res2" (stride 4) to "res5" (stride 32) of normalised images (B, 3, H, W)."""
        return dict(zip(self._shapes, self.features(x), strict=True))

    def join_lateral(self, name: str, lateral: Conv2d) -> bool:
        """Makes the convolution, plain and 1x1, part of the deconvolution that a map comes from, if one does."""
        shape, levels = self._shapes[name], self.features.feature_pyramid.levels
        if not isinstance(levels[str(shape.stride)], nn.Sequential):
            return False
        levels[str(shape.stride)][-1] = join(levels[str(shape.stride)][-1], lateral)
        self._shapes[name] = ShapeSpec(channels=lateral.out_channels, stride=shape.stride)
        return True

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map, by name."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """What height and width of the images must be multiples of."""
        return self._pad_divisor


def feature_shapes(config: PIIPConfig, names: Sequence[str]) -> dict[str, ShapeSpec]:
    """What `PIIPBackbone.output_shape` will say of some maps, for the `input_shape` of heads in a LazyConfig.

    Args:
        config: With `merging` set.
        names: Maps wanted, "res2" to "res5".
    """
    shapes = _shapes_of(config)
    return {name: shapes[name] for name in names}


@lru_cache(maxsize=8)  # several heads ask, and the largest networks take a second
def _shapes_of(config: PIIPConfig) -> dict[str, ShapeSpec]:
    with on_meta():
        return _shapes(DensePIIP(config))


def _shapes(features: DensePIIP) -> dict[str, ShapeSpec]:
    return {
        f"res{int(math.log2(stride))}": ShapeSpec(channels=dim, stride=stride)
        for dim, stride in zip(features.out_dims, features.out_strides, strict=True)
    }


class PIIPFPN(FPN):
    """Detectron2's FPN with the padding rule of its bottom-up network.

    Detectron2's own reports its largest stride instead, so images would be padded to multiples of 32.
    """

    def fold_for_inference(self) -> None:
        """Makes lateral convolutions one with the deconvolutions before them; `prepare_for_inference` calls it."""
        for i, (name, lateral) in enumerate(zip(self.in_features[::-1], self.lateral_convs, strict=True)):
            plain = type(lateral) is Conv2d and lateral.norm is None and lateral.activation is None
            read = self.top_block is not None and self.top_block.in_feature == name
            if plain and not read and self.bottom_up.join_lateral(name, lateral):
                self.lateral_convs[i] = nn.Identity()
                own_name = next(key for key, child in self.named_children() if child is lateral)
                self.set_submodule(own_name, self.lateral_convs[i])

    @property
    def size_divisibility(self) -> int:
        """What height and width of the images must be multiples of: the bottom-up network's."""
        return self.bottom_up.size_divisibility
