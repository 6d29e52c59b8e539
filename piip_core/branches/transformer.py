"""What all branches made of timm's transformer blocks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..config import BranchConfig
from .base import Branch, BranchState

__all__ = ["TransformerBranch", "resize_position_grid"]

MAX_POSITIONS = 16


def resize_position_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resizes position embeddings to another token grid: bicubic, in fp32, without antialiasing.

    Args:
        grid: (1, N, C) with N a square number, row-major.
        height: Rows of the new grid.
        width: Columns of the new grid.

    Returns:
        (1, height, width, C) in the dtype of `grid`.
    """
    side = int(grid.shape[1] ** 0.5)
    table = grid.unflatten(1, (side, side))
    if (height, width) == (side, side):
        return table
    table = F.interpolate(table.permute(0, 3, 1, 2).float(), size=(height, width), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).to(grid.dtype)


class TransformerBranch(Branch):
    """A transformer of timm, without its final norm and head, run on channels-last token maps.

    The state dict below `model.` has timm's names.

    Attributes:
        model: The network, with `patch_embed` (channels-last output) and `blocks`.
        keep_positions: Whether resized position embeddings are kept, for weights that do not change any more.
    """

    model: nn.Module
    keep_positions = False

    def __init__(self, config: BranchConfig) -> None:
        super().__init__(config)
        self._positions: dict[tuple[object, ...], Tensor] = {}

    def patch_map(self, image: Tensor) -> Tensor:
        """Patch embeddings (B, H, W, C) of an image; a remainder of the patch size is cut at the bottom and right."""
        patch = self.config.network.patch_size
        height, width = (side // patch for side in image.shape[-2:])
        # The convolution leaves channels first in memory, and every sum behind it would inherit that
        return self.model.patch_embed(image[..., : height * patch, : width * patch]).contiguous()

    def position_map(self, grid: Tensor, height: int, width: int) -> Tensor:
        """`resize_position_grid` of the position embeddings, once per size where `keep_positions` says so."""
        if not self.keep_positions or torch.compiler.is_compiling():
            return resize_position_grid(grid, height, width)
        key = height, width, grid.dtype, grid.device
        if key not in self._positions:
            with torch.inference_mode(False), torch.no_grad():
                table = resize_position_grid(grid.clone(), height, width).contiguous()
            if type(table) is not Tensor:  # a fake tensor must not outlive its mode
                return table
            if len(self._positions) >= MAX_POSITIONS:
                self._positions.clear()
            self._positions[key] = table
        return self._positions[key]

    def run_block(self, state: BranchState, index: int) -> BranchState:
        block = self.model.blocks[index]
        if state.prefix is None:
            return BranchState(block(state.tokens))
        tokens, prefix = self.split(block(self.sequence(state)), state)
        return BranchState(tokens, prefix)

    def remove_block(self, index: int) -> None:
        del self.model.blocks[index]

    @staticmethod
    def sequence(state: BranchState) -> Tensor:
        """All tokens of a state as one sequence (B, P + H * W, C), the prefix first."""
        tokens = state.tokens.flatten(1, 2)
        return tokens if state.prefix is None else torch.cat((state.prefix, tokens), dim=1)

    @staticmethod
    def split(sequence: Tensor, state: BranchState) -> tuple[Tensor, Tensor | None]:
        """Undoes `sequence`: the map (B, H, W, C) and the prefix."""
        grid = state.tokens.shape[1:3]
        if state.prefix is None:
            return sequence.unflatten(1, grid), None
        count = state.prefix.shape[1]
        return sequence[:, count:].unflatten(1, grid), sequence[:, :count]

    def layer_of(self, name: str) -> int | None:
        parts = name.split(".")[1:]  # without "model"
        return int(parts[1]) + 1 if parts[:1] == ["blocks"] else 0

    def _set_drop_path(self) -> None:
        """Sets the rates of stochastic depth; timm only knows the linear schedule."""
        rates = self.config.drop_path_rates(len(self.model.blocks))
        for block, rate in zip(self.model.blocks, rates, strict=True):
            block.drop_path1 = DropPath(rate)
            block.drop_path2 = DropPath(rate)
