"""Flop handles for fvcore, whose FlopCountAnalysis serves Detectron2's tools/analyze_model.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS
from fvcore.nn.jit_handles import get_shape
from torch.utils.flop_counter import flop_registry

import piip_core.ops  # noqa: F401  (registers the operators)


def register_flop_handles() -> None:
    """Teaches fvcore the multiply-accumulates of our operators and of PyTorch's attention, which it takes for nothing.

    fvcore has no public registry, and Detectron2's tool no option. Seen working with fvcore 0.1.5.post20221221.
    """
    operators = {
        "piip::deform_attn_grid": torch.ops.piip.deform_attn_grid,
        "piip::ms_deform_attn": torch.ops.piip.ms_deform_attn,
        "aten::scaled_dot_product_attention": torch.ops.aten._scaled_dot_product_flash_attention,
    }
    for name, operator in operators.items():
        _DEFAULT_SUPPORTED_OPS.setdefault(name, _handle(operator))


def _handle(operator: Any) -> Callable[[list[Any], list[Any]], int]:
    formula = flop_registry[operator]  # two for each multiply-accumulate
    return lambda inputs, outputs: formula(*map(get_shape, inputs)) // 2
