"""Flop handles for fvcore, whose FlopCountAnalysis serves Detectron2's tools/analyze_model.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS
from fvcore.nn.jit_handles import get_shape
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

import piip_core.ops  # noqa: F401  (registers the operators)


def register_flop_handles() -> None:
    """Teaches fvcore the multiply-accumulates of our operators and of PyTorch's attention, which it takes for nothing.

    fvcore has no public registry, and Detectron2's tool no option. Seen working with fvcore 0.1.5.post20221221.
    """
    formulas = {
        "piip::deform_attn_grid": flop_registry[torch.ops.piip.deform_attn_grid],
        "piip::ms_deform_attn": flop_registry[torch.ops.piip.ms_deform_attn],
        "aten::scaled_dot_product_attention": lambda query, key, value, *_: sdpa_flop_count(query, key, value),
    }
    for name, formula in formulas.items():
        _DEFAULT_SUPPORTED_OPS.setdefault(name, _handle(formula))


def _handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    """For fvcore, of PyTorch's formula, which counts two for each multiply-accumulate."""
    return lambda inputs, outputs: formula(*map(get_shape, inputs)) // 2
