"""One forward pass of a pyramid, with what happens inside of it written down."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, singledispatch

import torch
from torch import Tensor, nn

from ..branches import Branch, BranchState
from ..checkpoints import load_part
from ..errors import ConfigError, UserError
from ..interaction import CrossAttention, DeformableCrossAttention, Interaction
from ..pyramid import PIIP
from .attention import AttentionRow, attention_row, watch_attention
from .scene import Cells, Scene
from .spectrum import Spectrum, feature_spectrum

__all__ = ["BlockView", "Reading", "Trace", "choose_blocks", "find_pyramid", "load_pyramid_weights", "trace_pyramid"]


@dataclass(frozen=True)
class BlockView:
    """What one block of a branch looks at.

    Attributes:
        branch: Number of the branch, from 1.
        block: Index of the block, from 0.
        cells: The feature map behind the block.
        cell: Row and column of the query.
        window: Side of the attention windows in cells; None for global attention.
        attention: Self-attention of the query; None for a block without attention.
        energy: Root mean square of the features behind the block over the channels, (H, W).
    """

    branch: int
    block: int
    cells: Cells
    cell: tuple[int, int]
    window: int | None
    attention: AttentionRow | None
    energy: Tensor


@dataclass(frozen=True)
class Reading:
    """What one cell of a branch reads from the map of another branch in an interaction.

    Attributes:
        reader: Number of the branch that asks.
        source: Number of the branch that is read.
        cells: The feature map that is read.
        at: The middle of the asking cell, (x, y) in pixels of the network's input.
        points: Sampling points (heads, P, 2), (x, y) in pixels of the network's input; None for regular attention.
        weights: Weights of the points (heads, P), or of all cells (heads, H, W) for regular attention.
    """

    reader: int
    source: int
    cells: Cells
    at: tuple[float, float]
    points: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class Trace:
    """What a forward pass showed.

    Attributes:
        interaction: Index of the interaction looked into, from 0; None for a single branch.
        views: One per branch.
        readings: One per direction of each unit of the interaction, in the order they run.
        before: Spectrum of each branch's features before the interaction; empty for a single branch.
        after: The same behind it.
        depth: For each branch the spectra behind all of its blocks.
        cells: Feature map of each branch that `before` and `after` describe; for a single branch, behind the last
            block.
    """

    interaction: int | None
    views: tuple[BlockView, ...]
    readings: tuple[Reading, ...]
    before: tuple[Spectrum, ...]
    after: tuple[Spectrum, ...]
    depth: tuple[tuple[Spectrum, ...], ...]
    cells: tuple[Cells, ...]


def find_pyramid(model: nn.Module) -> PIIP:
    """The one PIIP inside a model.

    Raises:
        ConfigError: If there is none, or more than one.
    """
    pyramids = [module for module in model.modules() if isinstance(module, PIIP)]
    if len(pyramids) != 1:
        raise ConfigError(f"{type(model).__name__} holds {len(pyramids)} PIIP modules: expected one to look into")
    return pyramids[0]


def load_pyramid_weights(pyramid: PIIP, path: str | os.PathLike[str]) -> None:
    """Loads branches and interactions from a checkpoint of this project of whatever model around them.

    Raises:
        CheckpointError: If the file cannot be read, or does not hold exactly one set of all weights of the pyramid.
    """
    load_part(pyramid, path)


def choose_blocks(pyramid: PIIP, blocks: Sequence[int] | None = None) -> tuple[int, ...]:
    """The block of each branch to look into.

    Args:
        pyramid: The pyramid.
        blocks: Indices from 0: one for all branches, or one per branch from Branch 1 on; None for the middle ones.

    Raises:
        UserError: If a branch has no such block.
    """
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
    progress: Callable[[], None] = lambda: None,
) -> Trace:
    """Runs a pyramid on an image and looks inside.

    Args:
        pyramid: In evaluation mode, on any device.
        scene: The image and the query.
        blocks: See `choose_blocks`.
        interaction: Index from 0; None for the middle one.
        progress: Called after every block.

    Raises:
        UserError: If a block or the interaction does not exist.
        NotImplementedError: If a chosen block calls attention more than once.
    """
    count = len(pyramid.interactions)
    if interaction is None:
        interaction = count // 2 if count else None
    elif not 0 <= interaction < count:
        expected = f"an index from 0 to {count - 1}" if count else "none: a single branch has no interactions"
        raise UserError(f"interaction {interaction}: the model has {count} interactions; expected {expected}")
    recorder = _Recorder(pyramid, scene, choose_blocks(pyramid, blocks), progress)
    with ExitStack() as stack:
        for index, branch in enumerate(pyramid.branches):
            stack.enter_context(_observed_blocks(branch, partial(recorder.run_block, index)))
        if interaction is not None:
            stack.enter_context(recorder.watch_interaction(interaction))
        pyramid(scene.image.to(next(pyramid.parameters()).device))
    cells = recorder.cells or [recorder.last_cells[i] for i in range(len(pyramid.branches))]
    return Trace(
        interaction=interaction,
        views=tuple(recorder.views[i] for i in range(len(pyramid.branches))),
        readings=tuple(recorder.readings),
        before=tuple(recorder.before),
        after=tuple(recorder.after),
        depth=tuple(tuple(spectra) for spectra in recorder.depth),
        cells=tuple(cells),
    )


@contextmanager
def _observed_blocks(
    branch: Branch, run: Callable[[Callable[[BranchState, int], BranchState], BranchState, int], BranchState]
) -> Iterator[None]:
    """Lets `run(original, state, index)` take the place of the branch's `run_block`.

    A block is a method and not always a module, so there is nothing to hang a forward hook on.
    """
    branch.run_block = partial(run, branch.run_block)
    try:
        yield
    finally:
        del branch.run_block  # the class's own is visible again


@dataclass
class _Recorder:
    """Collects a `Trace` while the pyramid runs."""

    pyramid: PIIP
    scene: Scene
    blocks: Sequence[int]
    progress: Callable[[], None]
    views: dict[int, BlockView] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    before: list[Spectrum] = field(default_factory=list)
    after: list[Spectrum] = field(default_factory=list)
    depth: list[list[Spectrum]] = field(default_factory=list)
    cells: list[Cells] = field(default_factory=list)
    last_cells: dict[int, Cells] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.depth = [[] for _ in self.pyramid.branches]

    def run_block(
        self, number: int, original: Callable[[BranchState, int], BranchState], state: BranchState, index: int
    ) -> BranchState:
        """Runs block `index` of branch `number` (from 0) and writes down what is asked for."""
        branch = self.pyramid.branches[number]
        if index != self.blocks[number]:
            after = original(state, index)
        else:
            with watch_attention(branch) as calls:
                after = original(state, index)
            if len(calls) > 1:
                raise NotImplementedError(f"block {index} of branch {number + 1} calls attention {len(calls)} times")
            cells = self._cells(number, after.tokens, branch.strides[index])
            cell = cells.at(*self.scene.query)
            window, attention = branch.config.window_sizes[index], None
            if calls:
                prefix = 0 if state.prefix is None else state.prefix.shape[1]
                grid = tuple(state.tokens.shape[1:3])
                attention = attention_row(calls[0], grid, cell, window=window, prefix=prefix)
            energy = after.tokens[0].cpu().double().square().mean(dim=-1).sqrt()
            self.views[number] = BlockView(number + 1, index, cells, cell, window, attention, energy)
        self.last_cells[number] = self._cells(number, after.tokens, branch.strides[index])
        self.depth[number].append(self._spectrum(self.last_cells[number], after.tokens))
        self.progress()
        return after

    @contextmanager
    def watch_interaction(self, index: int) -> Iterator[None]:
        """Writes down the maps around an interaction, and what its attentions read."""
        interaction: Interaction = self.pyramid.interactions[index]
        strides = self.pyramid.config.strides_after(index)
        with ExitStack() as stack:
            hook = partial(self._around_interaction, strides)
            stack.enter_context(_hook(interaction, hook))
            for spec, unit in zip(interaction.specs, interaction.units.values(), strict=True):
                for injection, reader, source in (
                    (unit.into_low, spec.low, spec.high),
                    (unit.into_high, spec.high, spec.low),
                ):
                    if injection is not None:
                        hook = partial(self._on_reading, strides, reader, source)
                        stack.enter_context(_hook(injection.attn, hook))
            yield

    def _around_interaction(
        self, strides: Sequence[int], module: nn.Module, inputs: tuple[Sequence[Tensor]], outputs: Sequence[Tensor]
    ) -> None:
        for number, (before, after) in enumerate(zip(inputs[0], outputs, strict=True)):
            cells = self._cells(number, after, strides[number])
            self.cells.append(cells)
            self.before.append(self._spectrum(cells, before))
            self.after.append(self._spectrum(cells, after))

    def _on_reading(
        self,
        strides: Sequence[int],
        reader: int,
        source: int,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        query, value = inputs[:2]
        asking = self._cells(reader - 1, query, strides[reader - 1])
        read = self._cells(source - 1, value, strides[source - 1])
        row, column = asking.at(*self.scene.query)
        points, weights = _read(module, query, value, (row, column))
        if points is not None:
            points = points.cpu().double() * torch.tensor(read.extent, dtype=torch.float64)
        # The module puts the middle of a cell at its share of the map that is read
        at = ((column + 0.5) / asking.columns * read.extent[0], (row + 0.5) / asking.rows * read.extent[1])
        self.readings.append(Reading(reader, source, read, at, points, weights.cpu().double()))

    def _cells(self, number: int, tokens: Tensor, stride: int) -> Cells:
        size = stride / min(self.pyramid.factors[number], 1)  # no branch enlarges the image
        return Cells(*tokens.shape[1:3], (size, size))

    def _spectrum(self, cells: Cells, tokens: Tensor) -> Spectrum:
        rows, columns = cells.inside(*self.scene.size)
        return feature_spectrum(tokens[0, :rows, :columns])


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@singledispatch
def _read(attention: nn.Module, query: Tensor, value: Tensor, cell: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """Normalised points (heads, P, 2) and their weights, or None and the weights of all cells, of one query."""
    raise TypeError(f"cannot tell what {type(attention).__name__} reads: register it with _read")


@_read.register
def _read_points(attention: DeformableCrossAttention, query: Tensor, value: Tensor, cell: tuple[int, int]):
    locations, weights = attention.sampling_map(query, value)
    return locations[0, cell[0], cell[1]], weights[0, cell[0], cell[1]]


@_read.register
def _read_everything(attention: CrossAttention, query: Tensor, value: Tensor, cell: tuple[int, int]):
    with watch_attention(attention) as calls:
        attention.forward(query, value)  # once more, without hooks
    return None, calls[0].weights(0, cell[0] * query.shape[2] + cell[1]).unflatten(1, value.shape[1:3])
