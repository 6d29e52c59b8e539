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

_EXPENSIVE = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.convolution.", "aten._scaled_dot_product")


def run_checkpointed(mode: GradCheckpointing, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function whose activations are recomputed as `mode` says."""
    if not mode or not torch.is_grad_enabled():
        return function(*args)
    if mode == "cheap":
        contexts = partial(create_selective_checkpoint_contexts, _keeps)
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
    return checkpoint(function, *args, use_reentrant=False)


def _keeps(context: object, operator: Any, *args: Any, **kwargs: Any) -> bool:
    return str(operator).startswith(_EXPENSIVE)
