"""Lets the models of other libraries run their deformable attention on our operator."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .functional import SpatialShapes, ms_deform_attn

# A pattern, as transformers takes it, that no longer name matches
_LAYER = "^MultiScaleDeformableAttention$"


def patch(package: str) -> ExitStack:
    """Puts `ms_deform_attn` in place of the multi-scale deformable attention of another package.

    "transformers": models that `from_pretrained` and `from_config` build from then on have our operator in place of
    their layer MultiScaleDeformableAttention, and keep it: Deformable DETR, Grounding DINO, MM Grounding DINO,
    OmDet-Turbo, RT-DETR, LW-DETR, RF-DETR, PP-DocLayout. Those that exist do not change, nor do Mask2Former, OneFormer,
    RT-DETRv2, D-FINE and DEIMv2, which have no such layer. Models that are built by calling their class need
    `transformers.monkey_patching.apply_patches()` around it.

    "mmcv": `MultiScaleDeformableAttnFunction.apply`, and the function that mmcv calls on CPUs, for all models at once.
    mmcv hands over the sizes of the maps in a tensor: reading it is a synchronisation for each call on a GPU.

    Returns:
        What undoes it: use it in a `with` statement, or call its `close()`. Where the package is patched already,
        nothing happens, now and at the end.

    Raises:
        ValueError: for another name.
        ImportError: if the package is not installed, or has no such place.
    """
    patches = {"mmcv": _patch_mmcv, "transformers": _patch_transformers}
    if package not in patches:
        raise ValueError(f"package is {package!r}; expected one of {', '.join(map(repr, patches))}")
    undo = ExitStack()
    try:
        patches[package](undo)
    except (ImportError, AttributeError) as error:
        undo.close()
        raise ImportError(f"patch({package!r}) finds no deformable attention of {package} here: {error}") from error
    return undo


class _MultiScaleDeformableAttention(nn.Module):
    """transformers' layer of this name, which has no parameters."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _patch_transformers(undo: ExitStack) -> None:
    patching: Any = importlib.import_module("transformers.monkey_patching")
    if patching.get_patch_mapping().get(_LAYER) is not _MultiScaleDeformableAttention:
        patching.register_patch_mapping({_LAYER: _MultiScaleDeformableAttention})
        undo.callback(patching.unregister_patch_mapping, [_LAYER])


def _apply(value: Tensor, shapes: SpatialShapes, starts: Tensor, locations: Tensor, weights: Tensor, _: int) -> Tensor:
    return ms_deform_attn(value, shapes, locations, weights)


def _on_cpu(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def _patch_mmcv(undo: ExitStack) -> None:
    module: Any = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    function, name = module.MultiScaleDeformableAttnFunction, "multi_scale_deformable_attn_pytorch"
    if function.apply is not _apply:
        undo.callback(setattr, module, name, getattr(module, name))
        undo.callback(delattr, function, "apply")  # its own is inherited
        function.apply = staticmethod(_apply)
        setattr(module, name, _on_cpu)
