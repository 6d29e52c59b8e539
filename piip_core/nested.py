"""Tensors in tuples, lists and mappings inside each other, as modules and operators return them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["tensors_in"]


def tensors_in(value: object) -> list[Tensor]:
    """All tensors of a nested output, in order; anything else in it is left out."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
