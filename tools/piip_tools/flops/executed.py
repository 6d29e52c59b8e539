"""What a model holds and computes: parameters and multiply-accumulates of every module for given inputs.

Models and inputs may live on the meta device, so size is no limit. Counted are linear layers, convolutions, attention
products and deformable sampling, as PyTorch runs them, window padding included; norms, activations, biases and
resizing are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piip_core import ops  # noqa: F401  (registers the operator)

from .published import Count

MACS_PER_SAMPLE = 5  # four corners of the bilinear interpolation and the attention weight


@dataclass(frozen=True)
class ModuleCounts:
    """Counts of a model by module.

    Attributes:
        params: Parameters by their names.
        macs: Multiply-accumulates by the name of each module that was called, with those of the modules it called.
    """

    params: Mapping[str, int]
    macs: Counter[str]

    @property
    def total(self) -> Count:
        """The whole model."""
        return self.below("")

    def below(self, name: str) -> Count:
        """The module of that name with everything inside it; branches are never called themselves, but their blocks."""
        params = sum(count for key, count in self.params.items() if _is_inside(key, name))
        outermost: list[str] = []
        for key in sorted(self.macs):  # modules before what is inside them
            if _is_inside(key, name) and not any(_is_inside(key, other) for other in outermost):
                outermost.append(key)
        return Count(params, sum(self.macs[key] for key in outermost))


def _is_inside(name: str, outer: str) -> bool:
    return not outer or f"{name}.".startswith(f"{outer}.")


def executed_count(model: nn.Module, *inputs: Any, run: str = "") -> ModuleCounts:
    """Runs a model once without gradients and counts.

    Args:
        model: All its parameters are counted.
        inputs: Positional arguments of the forward.
        run: Name of the submodule to run on them; "" for the model itself.
    """
    formulas = {
        torch.ops.piip.deform_attn_grid: _deformable_grid_flops,
        torch.ops.piip.ms_deform_attn: _deformable_flops,
    }
    counter, module = FlopCounterMode(display=False, custom_mapping=formulas), model.get_submodule(run)
    with torch.no_grad(), _plain_attention(), counter:
        module(*inputs)
    names = {f"{type(module).__name__}{'.' * bool(name)}{name}": name for name, _ in module.named_modules()}
    macs = Counter()
    for key, flops in counter.get_flop_counts().items():
        if key in names:
            macs[".".join(filter(None, (run, names[key])))] = sum(flops.values()) // 2
    return ModuleCounts({name: parameter.numel() for name, parameter in model.named_parameters()}, macs)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Runs attention as plain products, of which the counter knows all: it does not know every fused kernel."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _deformable_flops(value: torch.Size, spatial_shapes: Any, locations: torch.Size, *_: Any, **__: Any) -> int:
    """(B, S, heads, D) values sampled at (B, Q, heads, levels, points, 2) locations."""
    batch, queries, heads, levels, points, _ = locations
    return 2 * MACS_PER_SAMPLE * batch * queries * heads * levels * points * value[-1]


def _deformable_grid_flops(
    value: torch.Size, value_shapes: Any, query_shape: Any, sampling: torch.Size, *_: Any, **__: Any
) -> int:
    """(B, S, heads, D) values sampled as (B, Q, 3 * heads * levels * points) offsets and logits say."""
    batch, queries, width = sampling
    return 2 * MACS_PER_SAMPLE * batch * queries * (width // 3) * value[-1]
