"""What a branch is, whatever network is inside: its configuration, the families there are, and what a pyramid asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeGuard, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..errors import check, check_choice
from ..recompute import GradCheckpointing, run_checkpointed


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether the value is a list, tuple or the like, and not a string."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def to_tuples(value: Any) -> Any:
    """Turns any nesting of sequences (lists, OmegaConf's ListConfig) into tuples."""
    return tuple(to_tuples(v) for v in value) if is_sequence(value) else value


def freeze_sequences(config: Any, *fields: str) -> None:
    """Turns the named fields of a frozen dataclass into tuples, so that equal configurations compare equal."""
    for field in fields:
        object.__setattr__(config, field, to_tuples(getattr(config, field)))


class NetworkConfig:
    """Base of the architecture descriptions, a frozen dataclass per family, which `register_branch` makes known.

    Attributes:
        family: Name of the family in dictionaries and files.
        depth: Number of blocks, as segments count them.
        dims: Channels after each block.
        strides: Pixels of the branch's image per feature cell after each block.
        no_windows: Why attention cannot work in windows; empty if it can.
        class_token: Whether the first prefix token of the branch is a class token.
    """

    family: ClassVar[str]

    depth: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    no_windows: str = ""
    class_token: bool = False

    def set_blocks(self, dims: tuple[int, ...], strides: tuple[int, ...], no_windows: str = "") -> None:
        """Sets the attributes that follow from the fields; for `__post_init__`."""
        for name, value in (("depth", len(dims)), ("dims", dims), ("strides", strides), ("no_windows", no_windows)):
            object.__setattr__(self, name, value)


NetworkT_co = TypeVar("NetworkT_co", bound=NetworkConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class BranchConfig(Generic[NetworkT_co]):
    """One branch of the pyramid.

    Args:
        network: Architecture of the branch.
        image_size: Image side in pixels the branch is meant for. Only ratios between branches matter: branch i sees
            the input resized by `image_size_i / largest image_size`.
        segments: First and last block (inclusive, from 0) that run before each interaction. None spreads the blocks
            evenly. In order and without gaps; blocks after the last segment run at the end.
        window_size: Side of the attention windows in tokens; None for global attention; a sequence gives one entry
            per block.
        window_padding: Where token maps that are no multiple of the window are padded with zeros. "before_qkv" is
            what every published model does: padded keys and values equal the qkv bias and take part in the softmax.
            "after_qkv" gives zero keys and values (the public implementation without flash attention).
        drop_path_rate: Stochastic depth rate.
        drop_path_schedule: "constant" over the blocks (published DeiT branches) or "linear" from 0.
        pretrained: Weights to start from: `timm:NAME` (downloaded by timm), or the path of a file in a published
            format (.pth or .safetensors). None for random weights. Read by
            `piip_core.checkpoints.load_pretrained`, not by the constructors of modules.
        frozen: Never train the network: see `Branch.freeze`.
    """

    network: NetworkT_co
    image_size: int
    segments: tuple[tuple[int, int], ...] | None = None
    window_size: int | tuple[int | None, ...] | None = None
    window_padding: Literal["before_qkv", "after_qkv"] = "before_qkv"
    drop_path_rate: float = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    pretrained: str | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        check(
            type(self.network) in [family.config for family in FAMILIES.values()],
            "BranchConfig.network",
            self.network,
            f"one of {', '.join(family.config.__name__ for family in FAMILIES.values())}; register_branch adds others",
        )
        freeze_sequences(self, "segments", "window_size")
        check(self.image_size > 0, "BranchConfig.image_size", self.image_size, "a positive number of pixels")
        check(0 <= self.drop_path_rate < 1, "BranchConfig.drop_path_rate", self.drop_path_rate, "a rate in [0, 1)")
        check_choice("BranchConfig.window_padding", self.window_padding, ("before_qkv", "after_qkv"))
        check_choice("BranchConfig.drop_path_schedule", self.drop_path_schedule, ("constant", "linear"))
        windows, depth = self.window_sizes, self.network.depth
        check(len(windows) == depth, "BranchConfig.window_size", windows, f"{depth} entries, one per block")
        for w in windows:
            check(w is None or w > 0, "BranchConfig.window_size", w, "a positive window side, or None for global")
            expected = f"None: {self.network.no_windows}"
            check(w is None or not self.network.no_windows, "BranchConfig.window_size", self.window_size, expected)
        start, expected = 0, f"consecutive [first, last] pairs of blocks 0 to {depth - 1}"
        for pair in self.segments or ():
            fits = len(pair) == 2 and pair[0] == start and start - 1 <= pair[1] < depth
            check(fits, "BranchConfig.segments", self.segments, expected)
            start = pair[1] + 1

    @property
    def window_sizes(self) -> tuple[int | None, ...]:
        """Window side of every block."""
        w = self.window_size
        return w if isinstance(w, tuple) else (w,) * self.network.depth


class BranchState(NamedTuple):
    """Features of a branch between two blocks.

    Attributes:
        tokens: Feature map, channels last, (B, H, W, C).
        prefix: Class or register tokens (B, P, C) that only the branch itself sees; None without.
        positions: Rotary positions and windows that the blocks of the branch share; None without.
    """

    tokens: Tensor
    prefix: Tensor | None = None
    positions: Any = None

    def sequence(self) -> Tensor:
        """All tokens as one sequence (B, P + H * W, C), the prefix first."""
        tokens = self.tokens.flatten(1, 2)
        return tokens if self.prefix is None else torch.cat((self.prefix, tokens), dim=1)


BranchT = TypeVar("BranchT", bound="Branch")


class Branch(nn.Module, ABC):
    """A network cut into blocks that the pyramid runs in segments.

    Subclasses wrap a library's network and implement `embed`, `run_block` and `layer_of`. A "block" is
    whatever the published segments count: a transformer block, a ConvNeXt layer or one of its downsampling layers.

    Attributes:
        config: The configuration the branch was built from.
        model: The library's network.
        dims: Channels after each block.
        strides: Pixels of the branch's own image per feature cell after each block.
    """

    model: nn.Module

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.config = config
        self.dims, self.strides = config.network.dims, config.network.strides
        self.grad_checkpointing: GradCheckpointing = False
        self.frozen = False

    def freeze(self) -> None:
        """Takes the network out of the training: no gradients of its parameters, and evaluation mode for good.

        Interactions write into it all the same, and learn through its blocks. What comes before the first of them
        keeps no activations.
        """
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self: BranchT, mode: bool = True) -> BranchT:
        """As of any module, but that a frozen branch stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @property
    def num_blocks(self) -> int:
        """Blocks that the branch has."""
        return len(self.dims)

    @abstractmethod
    def embed(self, image: Tensor) -> BranchState:
        """Turns the branch's image (B, 3, H, W) into the state before block 0; a remainder of the stride is cut."""

    @abstractmethod
    def run_block(self, state: BranchState, index: int) -> BranchState:
        """Runs one block."""

    @abstractmethod
    def layer_of(self, name: str) -> int | None:
        """Layer, for learning-rate decay, of a parameter by its name in the branch.

        0 for embeddings, block index + 1 for blocks, None for a parameter that takes no part in the decay.
        """

    def window(self, block: int, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width in tokens of the windows that a block attends in on a map; None for global attention."""
        side = self.config.window_sizes[block]
        return None if side is None else (side, side)

    def run(self, state: BranchState, start: int, stop: int) -> BranchState:
        """Runs blocks `start` to `stop` (exclusive), recomputing them in the backward pass if checkpointing is on."""
        for index in range(start, stop):
            state = run_checkpointed(self.grad_checkpointing, self.run_block, state, index)
        return state

    def set_grad_checkpointing(self, enable: GradCheckpointing = True) -> None:
        """Recomputes activations of blocks in the backward pass instead of keeping them; see `GradCheckpointing`."""
        self.grad_checkpointing = enable


BuilderT = TypeVar("BuilderT", bound=Callable[[BranchConfig], Branch])


class Family(NamedTuple):
    """Configuration and branch of a family of networks."""

    config: type[NetworkConfig]
    branch: Callable[[BranchConfig], Branch]


FAMILIES: dict[str, Family] = {}
"""Every registered family, by its name."""


def register_branch(network: type[NetworkConfig]) -> Callable[[BuilderT], BuilderT]:
    """Decorator of the `Branch`, or the function that makes one, for networks of this configuration.

    It also makes the configuration known in dictionaries and files, by its `family`.

    Raises:
        ConfigError: If another family has that name.
    """
    known = FAMILIES.get(network.family)
    check(
        known is None or known.config.__qualname__ == network.__qualname__,
        f"{network.__name__}.family",
        network.family,
        f"a name other than {', '.join(FAMILIES)}",
    )

    def register(branch: BuilderT) -> BuilderT:
        FAMILIES[network.family] = Family(network, branch)
        return branch

    return register


def build_branch(config: BranchConfig) -> Branch:
    """Builds the branch of the family of `config.network`, with random weights."""
    branch = FAMILIES[config.network.family].branch(config)
    if config.frozen:
        branch.freeze()
    return branch


def set_drop_path(blocks: Sequence[nn.Module], config: BranchConfig) -> None:
    """Sets the rates of stochastic depth of timm's blocks; timm itself knows the linear schedule alone."""
    steps = max(len(blocks) - 1, 1)
    for index, block in enumerate(blocks):
        share = index / steps if config.drop_path_schedule == "linear" else 1.0
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(config.drop_path_rate * share))
