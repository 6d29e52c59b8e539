"""Activations that the backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

GradCheckpointing = bool | Literal["cheap"]
"""What is recomputed: everything (True), nothing (False), or what is "cheap": interactions, and in blocks all but
matrix products, convolutions and self-attention, so norms, activations, residuals and copies."""

# Attention's kernels have no public names; PyTorch's documentation of selective checkpointing lists them by these.
# Those that another release brings would be recomputed. Seen with torch 2.10 to 2.14
_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_KERNELS = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in _ATTENTION]
_PRODUCTS = [torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution]
_EXPENSIVE = {*_PRODUCTS, *_KERNELS} - {None}


def run_checkpointed(mode: GradCheckpointing, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function whose activations are recomputed as `mode` says."""
    if not mode or not torch.is_grad_enabled():
        return function(*args)
    if mode == "cheap":
        contexts = partial(create_selective_checkpoint_contexts, _keeps)
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
    return checkpoint(function, *args, use_reentrant=False)


def _keeps(context: object, operator: Any, *args: Any, **kwargs: Any) -> bool:
    return getattr(operator, "overloadpacket", None) in _EXPENSIVE
