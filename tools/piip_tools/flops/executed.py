"""What a model holds and computes: parameters and multiply-accumulates of every module for given inputs.

Models and inputs may live on the meta device, so size is no limit. Counted are linear layers, convolutions, attention
products and deformable sampling, as PyTorch runs them, window padding included; norms, activations, biases and
resizing are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piip_core import ops  # noqa: F401  (registers the operator)

from .published import Count

__all__ = ["ModuleCounts", "attribute_to_modules", "executed_count"]

MACS_PER_SAMPLE = 5  # four corners of the bilinear interpolation and the attention weight


@dataclass(frozen=True)
class ModuleCounts:
    """Counts of a model by module.

    Attributes:
        params: Parameters by their names.
        macs: Multiply-accumulates by the name of the innermost module that ran them.
    """

    params: Mapping[str, int]
    macs: Mapping[str, int]

    @property
    def total(self) -> Count:
        """The whole model."""
        return Count(sum(self.params.values()), sum(self.macs.values()))

    def below(self, name: str) -> Count:
        """The module of that name with everything inside it."""
        return Count(
            sum(n for key, n in self.params.items() if key.startswith(f"{name}.")),
            sum(n for key, n in self.macs.items() if key == name or key.startswith(f"{name}.")),
        )


def executed_count(model: nn.Module, *inputs: Any, run: str = "") -> ModuleCounts:
    """Runs a model once without gradients and counts.

    Args:
        model: All its parameters are counted.
        inputs: Positional arguments of the forward.
        run: Name of the submodule to run on them; "" for the model itself.
    """
    macs: Counter[str] = Counter()
    formulas = {
        torch.ops.piip.deform_attn_grid: _deformable_grid_flops,
        torch.ops.piip.ms_deform_attn: _deformable_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    attribution = attribute_to_modules(model, counter.get_total_flops, macs)
    with torch.no_grad(), _plain_attention(), counter, attribution:
        model.get_submodule(run)(*inputs)
    params = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return ModuleCounts(params, {name: flops // 2 for name, flops in macs.items()})


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


@contextmanager
def attribute_to_modules(model: nn.Module, total: Callable[[], float], own: Counter[str]) -> Iterator[None]:
    """Adds to `own` how much each module of `model` raises a total outside the modules it calls.

    Modules are followed by call and not by name, because branches are run block by block and never called themselves.
    """
    calls: list[list[float]] = []  # of each running module: total at its start, spent in the modules it called

    def enter(*_: Any) -> None:
        calls.append([total(), 0])

    def leave(name: str) -> None:
        start, inner = calls.pop()
        spent = total() - start
        own[name] += spent - inner
        if calls:
            calls[-1][1] += spent

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(lambda *_, name=name: leave(name)).remove)
        yield


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
