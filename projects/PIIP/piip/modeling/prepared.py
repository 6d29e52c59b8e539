"""Detectors and segmentors for inference only."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

import piip_core
from piip_core.prepared import deconvolution_with_lateral

from .backbone import PIIPFPN, PIIPBackbone

__all__ = ["prepare_for_inference"]

Model = TypeVar("Model", bound=nn.Module)


def prepare_for_inference(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """`piip_core.prepare_for_inference` for models around a PIIP backbone, in place.

    In a `PIIPFPN` also the last deconvolution of a level and the lateral convolution of the FPN behind it become one,
    so that the largest maps of the backbone have the FPN's width.

    Args:
        model: Backbone, detector or segmentor.
        dtype: To cast floating parameters and buffers to afterwards.

    Raises:
        UserError: If there is no PIIP in the model.
    """
    for module in model.modules():
        if isinstance(module, PIIPFPN) and isinstance(module.bottom_up, PIIPBackbone):
            _fold_laterals(module, module.bottom_up)
    return piip_core.prepare_for_inference(model, dtype=dtype)


def _fold_laterals(fpn: PIIPFPN, backbone: PIIPBackbone) -> None:
    levels = backbone.features.feature_pyramid.levels
    shapes = backbone.output_shape()
    for place, name in enumerate(reversed(fpn.in_features)):  # the order of the FPN's lateral convolutions
        level, lateral = levels[str(shapes[name].stride)], fpn.lateral_convs[place]
        if not isinstance(level, nn.Sequential) or not _is_plain(lateral):
            continue
        level[-1] = deconvolution_with_lateral(level[-1], lateral)
        backbone.set_channels(name, lateral.out_channels)
        fpn.lateral_convs[place] = nn.Identity()
        setattr(fpn, f"fpn_lateral{int(math.log2(shapes[name].stride))}", fpn.lateral_convs[place])


def _is_plain(convolution: nn.Module) -> bool:
    return isinstance(convolution, nn.Conv2d) and convolution.norm is None and convolution.activation is None
