"""What all branches made of timm's transformer blocks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import check
from .base import Branch, BranchConfig, BranchState, NetworkConfig, set_drop_path

__all__ = ["PlainTransformerConfig", "TransformerBranch", "resize_position_grid"]

MAX_POSITIONS = 16


class PlainTransformerConfig(NetworkConfig):
    """What all plain vision transformers share: one width and one stride."""

    embed_dim: int
    num_heads: int
    patch_size: int

    @property
    def dims(self) -> tuple[int, ...]:
        """`embed_dim` for every block."""
        return (self.embed_dim,) * self.depth

    @property
    def strides(self) -> tuple[int, ...]:
        """`patch_size` for every block."""
        return (self.patch_size,) * self.depth

    def _check_sizes(self, *fields: str) -> None:
        name = type(self).__name__
        for field in ("embed_dim", "depth", "num_heads", "patch_size", *fields):
            check(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "a positive integer")
        check(
            self.embed_dim % self.num_heads == 0,
            f"{name}.num_heads",
            self.num_heads,
            f"a divisor of embed_dim={self.embed_dim}",
        )


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

    Args:
        config: The branch.
        model: The network, with `patch_embed` (channels-last output) and `blocks`.

    Attributes:
        keep_positions: Whether resized position embeddings are kept, for weights that do not change any more.
    """

    keep_positions = False

    def __init__(self, config: BranchConfig, model: nn.Module) -> None:
        super().__init__(config)
        self.model = model
        self._positions: dict[tuple[object, ...], Tensor] = {}
        set_drop_path(model.blocks, config)
        for block, window in zip(model.blocks, config.window_sizes, strict=True):
            if hasattr(block.attn, "window_size"):
                block.attn.window_size = window
                block.attn.pad_before_qkv = config.window_padding == "before_qkv"

    def patch_map(self, image: Tensor) -> Tensor:
        """Patch embeddings (B, H, W, C) of an image; a remainder of the patch size is cut at the bottom and right."""
        patch = self.config.network.strides[0]
        height, width = (side // patch * patch for side in image.shape[-2:])
        # The convolution leaves channels first in memory, and every sum after it would inherit that
        return self.model.patch_embed(image[..., :height, :width]).contiguous()

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
        """Runs one block on the map (B, H, W, C), or with a prefix on the sequence of both."""
        block = self.model.blocks[index]
        if state.prefix is None:
            return BranchState(block(state.tokens))
        tokens, prefix = self.split(block(self.sequence(state)), state)
        return BranchState(tokens, prefix)

    def remove_block(self, index: int) -> None:
        """Deletes the last block, whose index is given."""
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
        """Index + 1 for parameters of blocks, 0 for all others."""
        parts = name.split(".")[1:]  # without "model"
        return int(parts[1]) + 1 if parts[:1] == ["blocks"] else 0
