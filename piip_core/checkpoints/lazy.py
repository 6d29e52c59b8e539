"""State dicts whose tensors are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LazyState", "LazyTensor"]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by shape and type, and read by calling `load`."""

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """Wraps a tensor that is in memory."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyState(Mapping[str, Tensor]):
    """A read-only state dict that keeps no tensor: each access reads it from its file.

    Most tensors are views of the mapped file. They can be written to without changing the file, but other accesses may
    see the change: clone what you change. The file must not be overwritten in place while the state is in use
    (replacing it by a new one, as `write_checkpoint` does, is fine).

    Args:
        entries: The tensors by name.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> LazyState:
        """Wraps any state dict; one that is lazy already stays as it is."""
        if isinstance(state, LazyState):
            return state
        return cls({key: LazyTensor.of(tensor) for key, tensor in state.items()})

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries  # Mapping's own would read the tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, without reading a tensor."""
        return {key: tuple(entry.shape) for key, entry in self.entries.items()}

    def renamed(self, names: Iterable[str]) -> LazyState:
        """The same tensors under other names, given in the order of this state's own."""
        return LazyState(dict(zip(names, self.entries.values(), strict=True)))
