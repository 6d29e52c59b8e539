"""One forward pass of a pyramid, with what happens inside of it written down (paper section IV-G)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..branches import BranchState
from ..branches.transformer import split_windows
from ..errors import ConfigError, UserError
from ..interaction import DeformableCrossAttention, Interaction, InteractionUnit
from ..ops import make_reference_points
from ..pyramid import PIIP
from .scene import Box, Cells, Scene

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # that may be given by position


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one call of scaled dot product attention."""

    query: Tensor  # (batch, heads, N, head width)
    key: Tensor  # (batch, heads, S, head width)
    bias: Tensor | None  # added to the logits, broadcastable to (batch, heads, N, S), or a mask of what takes part
    scale: float

    def weights(self, sequence: int, position: int) -> Tensor:
        """Attention weights (heads, S) of one query, in float64, on the CPU."""
        query, key = self.query[sequence, :, position].cpu().double(), self.key[sequence].cpu().double()
        logits = torch.einsum("hd,hsd->hs", query, key) * self.scale
        if self.bias is not None:
            shape = (*self.query.shape[:3], self.key.shape[2])
            bias = self.bias.expand(shape)[sequence, :, position].cpu()
            logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias.double()
        return logits.softmax(dim=-1)


@dataclass(frozen=True)
class AttentionRow:
    """Where one cell of a map looks, per head; all weights of a head sum to 1."""

    weights: Tensor  # onto the cells of the map, (heads, H, W) float64
    prefix: Tensor  # onto class or register tokens, (heads, P)
    padding: Tensor  # onto cells outside of the map that fill up the window, (heads,)
    window: Box  # of what is seen


class AttentionWatch(TorchFunctionMode):
    """Collects the arguments of every scaled dot product attention, and changes nothing.

    Fused kernels do not return weights. Every branch family calls PyTorch's scaled dot product attention, whatever it
    adds to it (normalised or rotated queries and keys, relative position biases, windows): none is written again here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
            if given.get("is_causal") or given.get("enable_gqa"):
                raise NotImplementedError("causal and grouped attention cannot be drawn: no network here has either")
            query, key, scale = given["query"].detach(), given["key"].detach(), given.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            self.calls.append(AttentionCall(query, key, given.get("attn_mask"), scale))
        return func(*args, **kwargs)

    def only_call(self, network: nn.Module) -> AttentionCall | None:
        """The call of a block of the network; None for a block without attention.

        Raises:
            UserError: If timm's layers computed attention without the call that is watched.
        """
        if not self.calls and any(getattr(module, "fused_attn", None) is False for module in network.modules()):
            raise UserError("attention cannot be drawn while timm's fused attention is off: unset TIMM_FUSED_ATTN")
        if len(self.calls) > 1:
            raise NotImplementedError(f"a block calls attention {len(self.calls)} times: expected once")
        return self.calls[0] if self.calls else None


def attention_row(
    call: AttentionCall,
    grid: tuple[int, int],
    cell: tuple[int, int],
    *,
    window: tuple[int, int] | None = None,
    prefix: int = 0,
) -> AttentionRow:
    """Attention of one cell, laid back onto the map.

    Args:
        call: Self-attention of a map, batch size 1.
        grid: Height and width of the map.
        cell: Row and column of the query.
        window: Size of the windows, which are folded into the batch row by row; None for global attention.
        prefix: Number of tokens before those of the map.

    Raises:
        ValueError: If the call does not have the shape that these arguments imply.
    """
    (height, width), (row, column) = grid, cell
    numbers = torch.arange(1, height * width + 1).view(1, height, width, 1)  # of the cells; padding is 0
    sequences = numbers.flatten(1) if window is None else split_windows(numbers, window)[0, :, :, 0]
    found, expected = tuple(call.query.shape[::2]), (len(sequences), prefix + sequences.shape[1])
    if found != expected or call.key.shape[2] != expected[1]:
        raise ValueError(
            f"self-attention of {found[0]} sequences of {found[1]} tokens: expected {expected[0]} of {expected[1]} for "
            f"a map of {height} x {width}, window {window} and {prefix} further tokens"
        )
    sequence, position = (sequences == row * width + column + 1).nonzero()[0].tolist()
    weights, seen = call.weights(sequence, prefix + position), sequences[sequence]
    by_number = weights.new_zeros(len(weights), 1 + height * width).index_add(1, seen, weights[:, prefix:])
    y, x = (seen[seen > 0] - 1) // width, (seen[seen > 0] - 1) % width
    box = (int(y.min()), int(x.min()), int(y.max()) + 1, int(x.max()) + 1)
    return AttentionRow(by_number[:, 1:].unflatten(1, grid), weights[:, :prefix], by_number[:, 0], box)


def feature_spectrum(features: Tensor) -> Tensor:
    """Fourier spectrum of a map (H, W, C) of at least 2 x 2 cells (paper Figure 9).

    It is the natural logarithm of the amplitude over that at frequency 0, float64, at equal steps of the frequency from
    0 to the map's own highest, half a cycle per cell (the "pi" of plots).

    Each channel is scaled to the same total power, so that a few loud channels do not stand for all. Amplitudes are
    root mean squares over channels and rings of equal frequency: noise without structure is flat.
    """
    height, width, _ = features.shape
    if min(height, width) < 2:
        raise ValueError(f"a map of {height} x {width} cells has no spectrum: expected at least 2 x 2")
    power = torch.fft.fft2(features.cpu().double().permute(2, 0, 1)).abs().square()
    tiny = torch.finfo(torch.float64).tiny
    power = (power / power.sum(dim=(1, 2), keepdim=True).clamp(min=tiny)).mean(dim=0)
    floor = power.max() * 1e-24  # what rounding leaves of a frequency that is not there
    highest = min(height, width) // 2
    y, x = (2 * torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    ring = torch.round((y[:, None].square() + x.square()).sqrt() * highest).long().flatten()
    means = torch.bincount(ring, weights=power.flatten()) / torch.bincount(ring).clamp(min=1)
    curve = means[: highest + 1].clamp(min=floor)  # beyond, only the corners of the square contribute
    return 0.5 * (curve / curve[0]).log()


@dataclass(frozen=True)
class BlockView:
    """What one block of a branch looks at. Branches count from 1, blocks from 0."""

    branch: int
    block: int
    cells: Cells  # of the feature map after the block
    cell: tuple[int, int]  # row and column of the query
    window: tuple[int, int] | None  # size of the attention windows in cells; None for global attention
    attention: AttentionRow | None  # of the query; None for a block without attention
    energy: Tensor  # root mean square of the features over the channels, (H, W)


@dataclass(frozen=True)
class Reading:
    """What one cell of a branch reads from the map of another branch in an interaction. Branches count from 1."""

    reader: int
    source: int
    cells: Cells  # of the map that is read
    at: tuple[float, float]  # middle of the asking cell, (x, y) in pixels of the network's input
    points: Tensor | None  # sampling points (heads, P, 2) in the same pixels; None for regular attention
    weights: Tensor  # of the points (heads, P), or of all cells (heads, H, W) for regular attention


@dataclass
class Trace:
    """What a forward pass showed, branch by branch. A single branch has no interaction."""

    interaction: int | None  # the one looked into, from 0
    views: list[BlockView] = field(default_factory=list)  # of the chosen block of each branch
    depth: list[list[Tensor]] = field(default_factory=list)  # spectra after every block of each branch
    before: list[Tensor] = field(default_factory=list)  # spectrum of each branch before the interaction
    after: list[Tensor] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)  # per direction of each unit, in the order they run


def find_pyramid(model: nn.Module) -> PIIP:
    """The one PIIP inside a model.

    Raises:
        ConfigError: If there is none, or more than one.
    """
    pyramids = [module for module in model.modules() if isinstance(module, PIIP)]
    if len(pyramids) != 1:
        raise ConfigError(f"{type(model).__name__} holds {len(pyramids)} PIIP modules: expected one to look into")
    return pyramids[0]


def _choose_blocks(pyramid: PIIP, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """The block of each branch to look into."""
    depths = [branch.num_blocks for branch in pyramid.branches]
    if blocks is None:
        return tuple(depth // 2 for depth in depths)
    if len(blocks) not in (1, len(depths)):
        raise UserError(f"blocks {list(blocks)}: expected one index for all branches or {len(depths)}, one per branch")
    chosen = tuple(blocks) if len(blocks) == len(depths) else tuple(blocks) * len(depths)
    for number, (block, depth) in enumerate(zip(chosen, depths, strict=True), 1):
        if not 0 <= block < depth:
            raise UserError(f"block {block}: branch {number} has {depth} blocks; expected 0 to {depth - 1}")
    return chosen


@torch.no_grad()
def trace_pyramid(
    pyramid: PIIP,
    scene: Scene,
    *,
    blocks: Sequence[int] | None = None,
    interaction: int | None = None,
) -> Trace:
    """Runs a pyramid, which is in evaluation mode, on an image and looks inside.

    Args:
        pyramid: On any device.
        scene: The image and the query.
        blocks: Indices from 0 of the blocks to look into, one for all branches or one per branch; None: in the middle.
        interaction: Index from 0; None for the middle one.

    Raises:
        UserError: If a block or the interaction does not exist.
    """
    count = len(pyramid.interactions)
    if interaction is None:
        interaction = count // 2 if count else None
    elif not 0 <= interaction < count:
        expected = f"an index from 0 to {count - 1}" if count else "none: a single branch has no interactions"
        raise UserError(f"interaction {interaction}: the model has {count} interactions; expected {expected}")
    trace = Trace(interaction, depth=[[] for _ in pyramid.branches])
    with ExitStack() as stack:
        for index, chosen in enumerate(_choose_blocks(pyramid, blocks)):
            _observe_blocks(stack, trace, scene, pyramid, index, chosen)
        if interaction is not None:
            _observe_interaction(stack, trace, scene, pyramid, interaction)
        pyramid(scene.pixel_values.to(next(pyramid.parameters()).device))
    trace.views.sort(key=lambda view: view.branch)
    return trace


def _observe_blocks(stack: ExitStack, trace: Trace, scene: Scene, pyramid: PIIP, index: int, chosen: int) -> None:
    """Writes down what one branch has after each block, and where the chosen block looks, until the stack is closed."""
    branch = pyramid.branches[index]
    original = branch.run_block

    def run_block(state: BranchState, block: int) -> BranchState:
        with AttentionWatch() as watch:
            after = original(state, block)
        cells = _cells(pyramid, index, after.tokens, branch.strides[block])
        if block == chosen:
            cell, (height, width) = cells.at(*scene.query), state.tokens.shape[1:3]
            call, attention = watch.only_call(branch), None
            window = branch.window(block, (height, width))
            if call is not None:
                prefix = 0 if state.prefix is None else state.prefix.shape[1]
                attention = attention_row(call, (height, width), cell, window=window, prefix=prefix)
            energy = after.tokens[0].cpu().double().square().mean(dim=-1).sqrt()
            trace.views.append(BlockView(index + 1, block, cells, cell, window, attention, energy))
        trace.depth[index].append(_spectrum(scene, cells, after.tokens))
        return after

    # A block is a method and not always a module, so there is nothing to hang a forward hook on
    vars(branch)["run_block"] = run_block
    stack.callback(delattr, branch, "run_block")  # the class's own is visible again


def _observe_interaction(stack: ExitStack, trace: Trace, scene: Scene, pyramid: PIIP, index: int) -> None:
    """Writes down the maps around an interaction, and what its attentions read, until the stack is closed."""
    interaction, strides = pyramid.interactions[index], pyramid.config.strides_after(index)
    assert isinstance(interaction, Interaction)  # not in the type of a ModuleList

    def compare(module: nn.Module, inputs: tuple[Sequence[Tensor]], outputs: Sequence[Tensor]) -> None:
        for maps, spectra in ((inputs[0], trace.before), (outputs, trace.after)):
            spectra += [_spectrum(scene, _cells(pyramid, i, x, strides[i]), x) for i, x in enumerate(maps)]

    def read(reader: int, source: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        query, value = inputs[:2]
        asking = _cells(pyramid, reader - 1, query, strides[reader - 1])
        read = _cells(pyramid, source - 1, value, strides[source - 1])
        row, column = asking.at(*scene.query)
        points, weights = _read(module, query, value, (row, column))
        if points is not None:
            points = points.cpu().double() * torch.tensor(read.extent, dtype=torch.float64)
        # The module puts the middle of a cell at its share of the map that is read
        at = ((column + 0.5) / asking.columns * read.extent[0], (row + 0.5) / asking.rows * read.extent[1])
        trace.readings.append(Reading(reader, source, read, at, points, weights.cpu().double()))

    stack.callback(interaction.register_forward_hook(compare).remove)
    for spec, unit in zip(interaction.specs, interaction.units.values(), strict=True):
        assert isinstance(unit, InteractionUnit)
        for injection, reader, source in ((unit.into_low, spec.low, spec.high), (unit.into_high, spec.high, spec.low)):
            if injection is not None:
                stack.callback(injection.attn.register_forward_hook(partial(read, reader, source)).remove)


def _cells(pyramid: PIIP, index: int, tokens: Tensor, stride: int) -> Cells:
    size = stride / min(pyramid.factors[index], 1)  # no branch enlarges the image
    return Cells(tokens.shape[1], tokens.shape[2], (size, size))


def _spectrum(scene: Scene, cells: Cells, tokens: Tensor) -> Tensor:
    rows, columns = cells.inside(*scene.size)
    return feature_spectrum(tokens[0, :rows, :columns])


def _read(attention: nn.Module, query: Tensor, value: Tensor, cell: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """Normalised points (heads, P, 2) and their weights, or None and the weights of all cells, of one query."""
    row, column = cell
    if isinstance(attention, DeformableCrossAttention):
        index = row * query.shape[2] + column
        reference = make_reference_points(*query.shape[1:3], device=query.device)[:, index : index + 1]
        grid = (value.shape[1], value.shape[2])
        locations, weights = attention.sampling(query[:, row, column, None], reference, [grid])
        return locations[0, 0, :, 0], weights[0, 0, :, 0]
    with AttentionWatch() as watch:
        attention.forward(query, value)  # once more, without hooks
    return None, watch.calls[0].weights(0, row * query.shape[2] + column).unflatten(1, value.shape[1:3])
