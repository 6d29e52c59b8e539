"""Cross-branch interactions (paper section III-B): neighbouring branches exchange features after each segment.

All feature maps here are channels last, (B, H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from .config import InteractionConfig, UnitSpec
from .errors import ConfigError
from .ops import MSDeformAttn, deform_attn_grid

NORM_EPS = 1e-6


class DeformableCrossAttention(MSDeformAttn):
    """Single-level deformable attention from one map to another.

    Queries at (y, x) of an H x W map look around ((x + 0.5) / W, (y + 0.5) / H) of the value map.

    Attributes:
        sampling_linear: `sampling_offsets` and `attention_weights` in one, after `prepare_for_inference`.
    """

    def __init__(self, embed_dim: int, value_dim: int, config: InteractionConfig) -> None:
        super().__init__(
            embed_dim,
            num_heads=config.num_heads,
            num_points=config.num_points,
            value_ratio=config.value_ratio,
            value_dim=value_dim,
        )
        self.sampling_linear: nn.Linear | None = None

    def forward(self, query: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]  # maps, no reference points
        """(B, Hq, Wq, C) and (B, Hv, Wv, Cv) to (B, Hq, Wq, C)."""
        grid = query.shape[1:3]
        values = self.value_proj(value).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        if self.sampling_linear is not None:
            sampling = self.sampling_linear(query)
        else:
            sampling = torch.cat((self.sampling_offsets(query), self.attention_weights(query)), dim=-1)
        out = deform_attn_grid(values, [value.shape[1:3]], grid, sampling.flatten(1, 2), self.num_points)
        return self.output_proj(out).unflatten(1, grid)


class CrossAttention(nn.Module):
    """Regular multi-head cross-attention over all positions of the other map (Table XVI's "regular" attention)."""

    def __init__(self, embed_dim: int, value_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(
                f"InteractionConfig.num_heads={num_heads}: expected a divisor of branch width {embed_dim}"
            )
        self.num_heads = num_heads
        self.wq = nn.Linear(embed_dim, embed_dim, bias=False)
        self.wk = nn.Linear(value_dim, embed_dim, bias=False)
        self.wv = nn.Linear(value_dim, embed_dim, bias=False)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """(B, Hq, Wq, C) and (B, Hv, Wv, Cv) to (B, Hq, Wq, C)."""
        q, k, v = (
            linear(x.flatten(1, 2)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in ((self.wq, query), (self.wk, value), (self.wv, value))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out).unflatten(1, query.shape[1:3])


class ConvFFN(nn.Module):
    """Linear, 3x3 depthwise convolution on the token map, GELU, linear."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class Injection(nn.Module):
    """One direction of an interaction unit: features of another branch flow into the query branch (equations 1, 2).

    Both residual paths start at zero (`attn_gamma`, `ffn_gamma`), so a fresh model computes what its pretrained
    branches compute. `prepare_for_inference` makes these scales part of the weights before them, and None.
    """

    def __init__(self, query_dim: int, value_dim: int, config: InteractionConfig) -> None:
        super().__init__()
        feature_dim = query_dim if config.projection else value_dim
        self.proj = nn.Linear(value_dim, query_dim) if config.projection else nn.Identity()
        self.query_norm = _norm(config, query_dim)
        self.value_norm = _norm(config, feature_dim)
        self.attn_gamma: nn.Parameter | None = nn.Parameter(torch.zeros(query_dim))
        self.ffn: ConvFFN | None = None
        if config.ffn:
            self.ffn_norm = _norm(config, query_dim)
            self.ffn = ConvFFN(query_dim, int(query_dim * config.ffn_ratio))
            self.ffn_gamma: nn.Parameter | None = nn.Parameter(torch.zeros(query_dim))
            self.drop_path = DropPath(config.drop_path_rate)
        self.apply(_init_weights)
        # after the rest: deformable attention brings its own initialisation
        if config.attention == "deformable":
            self.attn: nn.Module = DeformableCrossAttention(query_dim, feature_dim, config)
        else:
            self.attn = CrossAttention(query_dim, feature_dim, config.num_heads).apply(_init_weights)

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """Updated query map (B, Hq, Wq, Cq) from the value map (B, Hv, Wv, Cv)."""
        value = self.value_norm(self.proj(value))
        query = query + _scale(self.attn_gamma, self.attn(self.query_norm(query), value))
        if self.ffn is not None:
            query = query + self.drop_path(_scale(self.ffn_gamma, self.ffn(self.ffn_norm(query))))
        return query


class InteractionUnit(nn.Module):
    """Exchange between two branches; both directions read the values from before the unit (paper Figure 4)."""

    def __init__(self, dims: Sequence[int], spec: UnitSpec, config: InteractionConfig) -> None:
        super().__init__()
        low, high = dims[spec.low - 1], dims[spec.high - 1]
        self.into_low = Injection(low, high, config) if spec.into_low else None
        self.into_high = Injection(high, low, config) if spec.into_high else None

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of the lower- and the higher-numbered branch, before and after."""
        new_low = low if self.into_low is None else self.into_low(low, high)
        new_high = high if self.into_high is None else self.into_high(high, low)
        return new_low, new_high


class Interaction(nn.Module):
    """An ordered list of interaction units; each reads what the units before it wrote."""

    def __init__(self, dims: Sequence[int], specs: Sequence[UnitSpec], config: InteractionConfig) -> None:
        super().__init__()
        self.specs = tuple(specs)
        units = {f"{spec.low}_{spec.high}": InteractionUnit(dims, spec, config) for spec in self.specs}
        self.units = nn.ModuleDict(units)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map per branch, (B, H_i, W_i, C_i), before and after."""
        maps = list(maps)
        for spec, unit in zip(self.specs, self.units.values(), strict=True):
            i, j = spec.low - 1, spec.high - 1
            maps[i], maps[j] = unit(maps[i], maps[j])
        return maps


def _scale(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _norm(config: InteractionConfig, dim: int) -> nn.Module:
    return nn.LayerNorm(dim, eps=NORM_EPS) if config.norm == "layernorm" else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
