"""What a model and its parts hold and compute for an image, beside the published counts.

Models and inputs may live on the meta device, so size is no limit. Counted are linear layers, convolutions, attention
products and deformable sampling, as PyTorch runs them, window padding included; norms, activations, biases and
resizing are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from piip_core.classifier import PIIPClassifier, build_model
from piip_core.config import ClassifierConfig, PIIPConfig
from piip_core.errors import ConfigError
from piip_core.meta import on_meta
from piip_core.pyramid import PIIP

from .published import Count, PublishedCount, published_count


@dataclass(frozen=True)
class ModuleCounts:
    """Counts of a model by module."""

    params: Mapping[str, int]  # by the names of the parameters
    macs: Counter[str]  # by the name of each module that was called, with those of the modules it called

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

    `run` is the name of the submodule that gets the `inputs`, "" for the model itself; all parameters are counted.
    """
    counter, module = FlopCounterMode(display=False), model.get_submodule(run)
    with torch.no_grad(), _plain_attention(), counter:
        module(*inputs)
    names = {f"{type(module).__name__}{'.' * bool(name)}{name}": name for name, _ in module.named_modules()}
    macs = Counter()
    for key, flops in counter.get_flop_counts().items():
        if key in names:
            macs[".".join(filter(None, (run, names[key])))] = sum(flops.values()) // 2
    return ModuleCounts({name: parameter.numel() for name, parameter in model.named_parameters()}, macs)


def executed_macs(call: Callable[[], object]) -> int:
    """Multiply-accumulates of all that a call runs, without gradients."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_attention(), counter:
        call()
    return counter.get_total_flops() // 2


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


@dataclass(frozen=True, kw_only=True)
class ModuleRow:
    """One part of a model. None where a part does not exist by that rule, or was not run; FLOPs are MACs."""

    name: str
    params: int | None = None  # that it holds
    flops: int | None = None  # that it executes
    params_published_count: int | None = None  # by the published rule
    flops_published_count: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelReport(ModuleRow):
    """Counts of a model and of its parts, which add up to it.

    `input_size` is height and width of the image of the executed count. The published count is always of one square
    image of the last branch's size.
    """

    input_size: tuple[int, int]
    modules: tuple[ModuleRow, ...] = field(repr=False)


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """Rounds height and width up to multiples of `divisor`."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def analyze_backbone(config: PIIPConfig | ClassifierConfig, input_size: tuple[int, int] | None = None) -> ModelReport:
    """Counts a backbone or classifier on the meta device; `merging=None` is just branches and interactions.

    `input_size` is height and width of the image, padding included; None is a square of the last branch's size.
    """
    with on_meta():
        model = build_model(config)
    return analyze_model(model, input_size)


def analyze_model(model: nn.Module, input_size: tuple[int, int] | None = None, *, backbone: str = "") -> ModelReport:
    """Counts a model with one PIIP inside: parameters of all of it, multiply-accumulates of its backbone.

    Args:
        model: Of any device; on the meta device nothing is computed or stored.
        input_size: As for `analyze_backbone`.
        backbone: Name of the submodule that takes the image and is run; "" for the model itself.

    Raises:
        ConfigError: If the model does not hold exactly one PIIP.
    """
    pyramids = [(name, module) for name, module in model.named_modules() if isinstance(module, PIIP)]
    if len(pyramids) != 1:
        raise ConfigError(f"{type(model).__name__} holds {len(pyramids)} PIIP modules: expected one to analyze")
    ((name, pyramid),) = pyramids
    side = pyramid.config.branches[pyramid.config.largest_image - 1].image_size
    height, width = input_size or (side, side)
    image = torch.empty(1, 3, height, width, device=next(model.parameters()).device)
    counts = executed_count(model, image, run=backbone)
    holder = model.get_submodule(name.rpartition(".")[0])
    try:
        published = published_count(holder.config if isinstance(holder, PIIPClassifier) else pyramid.config)
    except NotImplementedError:  # networks that no published model has
        published = None
    total = _row(type(model).__name__, counts.total, published and published.total)
    modules = tuple(_parts(model, name, published, counts, backbone))
    return ModelReport(**vars(total), input_size=(height, width), modules=modules)


def _parts(
    model: nn.Module, pyramid: str, published: PublishedCount | None, counts: ModuleCounts, backbone: str
) -> Iterator[ModuleRow]:
    """Parts of the pyramid, then its siblings (merging, feature pyramid), rest of the backbone, rest of the model."""
    for i in range(len(model.get_submodule(pyramid).branches)):
        branch = published and published.branches[i]
        yield _row(f"branch{i + 1}", counts.below(_join(pyramid, f"branches.{i}")), branch)
    yield _row("interactions", counts.below(_join(pyramid, "interactions")), published and published.interactions)
    # The published count puts a classifier on dense models, too
    head = published and published.head
    if not isinstance(model.get_submodule(pyramid.rpartition(".")[0]), PIIPClassifier):
        if head is not None:
            yield _row("head (published count only)", None, head)
        head = None
    inner = pyramid
    while inner:  # outwards from the pyramid, every sibling on the way
        outer = inner.rpartition(".")[0]
        for child, module in model.get_submodule(outer).named_children():
            name = _join(outer, child)
            if name != inner and any(True for _ in module.parameters()):
                was_run = not backbone or f"{name}.".startswith(f"{backbone}.")
                yield _row(name, counts.below(name), head, was_run=was_run)
        inner = outer


def _row(name: str, executed: Count | None, published: Count | None, *, was_run: bool = True) -> ModuleRow:
    return ModuleRow(
        name=name,
        params=executed and executed.params,
        flops=executed.macs if executed and was_run else None,
        params_published_count=published and published.params,
        flops_published_count=published and published.macs,
    )


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner
