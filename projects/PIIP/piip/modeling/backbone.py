"""PIIP as a Detectron2 backbone, and an FPN that keeps its padding rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor, nn

from piip_core import DensePIIP, PIIPConfig
from piip_core.checkpoints import load_pretrained
from piip_core.folding import is_bare
from piip_core.meta import on_meta

__all__ = ["PIIPBackbone", "PIIPFPN"]


class PIIPBackbone(Backbone):
    """A PIIP backbone (branches, interactions, merging, feature pyramid) in Detectron2's contract.

    Args:
        config (PIIPConfig): with `merging` set.
        pad_divisor (int): images are padded at the bottom and right to multiples of it. Published models were
            trained with 224 (64 for single branches): padded cells take part in window attention.
        pretrained (bool): load the weights that the branches name in `BranchConfig.pretrained`. Turn it off when a
            checkpoint of the whole model follows. Nothing is loaded on the meta device.
        use_act_checkpoint (bool): recompute activations in the backward pass to save memory.
    """

    def __init__(
        self, config: PIIPConfig, *, pad_divisor: int, pretrained: bool = True, use_act_checkpoint: bool = False
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

    def forward(self, x: Tensor, laterals: Mapping[str, nn.Conv2d] | None = None) -> dict[str, Tensor]:
        """Feature maps "res2" (stride 4) to "res5" (stride 32) of normalised images (B, 3, H, W).

        A map named in `laterals` is what that plain 1x1 convolution makes of it; see `DensePIIP.forward`.
        """
        maps = self.features(x, None if laterals is None else [laterals.get(name) for name in self._shapes])
        return dict(zip(self._shapes, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        return self._pad_divisor

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._pad_divisor}


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
    """Detectron2's FPN with the padding rule of its bottom-up network, and less work on its largest maps.

    Detectron2's own reports its largest stride instead, so images would be padded to multiples of 32. And it computes
    lateral convolutions behind the deconvolutions of a `PIIPBackbone`; here they are one, if there is no norm.

    Args:
        args: of `FPN`.
        fuse_type (str): as for `FPN`.
        kwargs: of `FPN`.
    """

    def __init__(self, *args: Any, fuse_type: str = "sum", **kwargs: Any) -> None:
        super().__init__(*args, fuse_type=fuse_type, **kwargs)
        self.averages = fuse_type == "avg"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps "p2", "p3", ... of normalised images (B, 3, H, W)."""
        names = self.in_features[::-1]
        laterals = dict(zip(names, self.lateral_convs, strict=True))
        joined = {name: lateral for name, lateral in laterals.items() if self._can_be_joined(name, lateral)}
        features = self.bottom_up(x, joined) if joined else self.bottom_up(x)
        outputs = list(self.output_shape())
        above, results = None, []
        for (name, lateral), output in zip(laterals.items(), self.output_convs, strict=True):
            level = features[name] if name in joined else lateral(features[name])
            if above is not None:
                level = level + F.interpolate(above, scale_factor=2.0, mode="nearest")
                level = level / 2 if self.averages else level
            above = level
            results.insert(0, output(level))
        if self.top_block is not None:
            maps = {**dict(zip(outputs, results, strict=False)), **features}
            results += self.top_block(maps[self.top_block.in_feature])
        return dict(zip(outputs, results, strict=True))

    def _can_be_joined(self, name: str, lateral: nn.Module) -> bool:
        """Whether the backbone may compute it: it does nothing else, and nobody reads the map before it."""
        plain = is_bare(lateral, Conv2d) and lateral.norm is None and lateral.activation is None
        read = self.top_block is not None and self.top_block.in_feature == name
        return plain and not read and isinstance(self.bottom_up, PIIPBackbone)

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {**super().padding_constraints, **self.bottom_up.padding_constraints}
