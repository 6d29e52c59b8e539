"""What the pyramid asks of a branch, whatever network is inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import BranchConfig
from ..networks import NetworkConfig

__all__ = ["Branch", "BranchState", "build_branch", "register_branch"]


class BranchState(NamedTuple):
    """Features of a branch between two blocks.

    Attributes:
        tokens: Feature map, channels last, (B, H, W, C).
        prefix: Class or register tokens (B, P, C) that only the branch itself sees; None without.
        rotary: Rotary position embedding that all blocks of the branch use; None without.
    """

    tokens: Tensor
    prefix: Tensor | None = None
    rotary: Tensor | None = None


class Branch(nn.Module, ABC):
    """A network cut into blocks that the pyramid runs in segments.

    Subclasses wrap a library's network, fill `dims` and `strides`, and implement `embed`, `run_block` and
    `layer_of`. A "block" is whatever the published segments count: a transformer block, a ConvNeXt layer or one of
    its downsampling layers.

    Attributes:
        config: The configuration the branch was built from.
        dims: Channels after each block.
        strides: Pixels of the branch's own image per feature cell after each block.
    """

    config: BranchConfig
    dims: tuple[int, ...]
    strides: tuple[int, ...]

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False

    @property
    def num_blocks(self) -> int:
        return len(self.dims)

    @abstractmethod
    def embed(self, image: Tensor) -> BranchState:
        """Turns the branch's image (B, 3, H, W) into the state before block 0; a remainder of the stride is cut."""

    @abstractmethod
    def run_block(self, state: BranchState, index: int) -> BranchState:
        """Runs one block."""

    @abstractmethod
    def layer_of(self, name: str) -> int | None:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            name: Parameter name relative to the branch.

        Returns:
            0 for embeddings, block index + 1 for blocks, None for a parameter that takes no part in the decay.
        """

    @abstractmethod
    def remove_block(self, index: int) -> None:
        """Removes the last block, whose index is given."""

    def truncate(self, count: int) -> None:
        """Keeps the first `count` blocks alone."""
        for index in reversed(range(count, self.num_blocks)):
            self.remove_block(index)
        self.dims, self.strides = self.dims[:count], self.strides[:count]

    def run(self, state: BranchState, start: int, stop: int) -> BranchState:
        """Runs blocks `start` to `stop` (exclusive), recomputing them in the backward pass if checkpointing is on."""
        for index in range(start, stop):
            if self.grad_checkpointing and torch.is_grad_enabled():
                state = checkpoint(self.run_block, state, index, use_reentrant=False)
            else:
                state = self.run_block(state, index)
        return state

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: block activations are recomputed in the backward pass."""
        self.grad_checkpointing = enable


_BUILDERS: dict[type[NetworkConfig], Callable[[BranchConfig], Branch]] = {}


def register_branch(network: type[NetworkConfig]):
    """Decorator: the `Branch`, or the function that makes one, is used for this type of network configuration."""

    def register(branch: Callable[[BranchConfig], Branch]) -> Callable[[BranchConfig], Branch]:
        _BUILDERS[network] = branch
        return branch

    return register


def build_branch(config: BranchConfig) -> Branch:
    """Builds the branch for the type of `config.network`.

    Raises:
        TypeError: If no branch is registered for that type.
    """
    try:
        branch = _BUILDERS[type(config.network)]
    except KeyError:
        known = ", ".join(sorted(network.__name__ for network in _BUILDERS))
        raise TypeError(f"no branch is registered for {type(config.network).__name__}; known are {known}") from None
    return branch(config)
