"""Attention weights of one query, from the queries and keys that the network itself hands to the attention kernel.

Fused kernels do not return weights. Every branch family calls PyTorch's scaled dot product attention, whatever it adds
to it (normalised or rotated queries and keys, relative position biases, windows), so that call is what is watched: no
family's attention is written a second time here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import window_partition
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError

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
    window: tuple[int, int, int, int]  # first row and column, last row and column (exclusive) of what is seen


class AttentionWatch(TorchFunctionMode):
    """Collects the arguments of every scaled dot product attention, and changes nothing."""

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
    call: AttentionCall, grid: tuple[int, int], cell: tuple[int, int], *, window: int | None = None, prefix: int = 0
) -> AttentionRow:
    """Attention of one cell, laid back onto the map.

    Args:
        call: Self-attention of a map, batch size 1.
        grid: Height and width of the map.
        cell: Row and column of the query.
        window: Side of the windows, which are folded into the batch row by row; None for global attention.
        prefix: Number of tokens before those of the map.

    Raises:
        ValueError: If the call does not have the shape that these arguments imply.
    """
    (height, width), (row, column) = grid, cell
    numbers = torch.arange(1, height * width + 1).view(1, height, width, 1)  # of the cells; padding is 0
    sequences = (numbers if window is None else window_partition(numbers, window)[0]).flatten(1)
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
