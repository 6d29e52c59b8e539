"""Any vision transformer or ConvNeXt of timm as a branch, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from .networks import NetworkConfig
from .validation import check, to_tuples

__all__ = ["TimmConfig"]


class _Structure(NamedTuple):
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    no_windows: str


@dataclass(frozen=True, kw_only=True)
class TimmConfig(NetworkConfig):
    """A network of timm: DINOv3, EVA-02, SigLIP 2, CLIP, DINOv2 with registers, ConvNeXt V2 and so on.

    Supported are models of timm's classes `VisionTransformer`, `Eva` (with rotary positions) and `ConvNeXt`. Images may
    have any size: position embeddings are resized, and rotary positions computed, as timm does.

    Args:
        name: Name in `timm.list_models()`, for example "vit_small_patch16_dinov3". Weights are named apart, in
            `BranchConfig.pretrained`.
        patch_size: Side of a patch in pixels; None for the model's own. Interactions and feature pyramids like 16;
            a pretrained patch kernel of another size is resized.
        keep_prefix_tokens: Keep class and register tokens. They take part in self-attention only; window attention
            needs a network without.
        options: Other arguments of `timm.create_model`, as a mapping or pairs.

    Raises:
        ConfigError: If timm has no such model, or one of another class.
    """

    family: ClassVar[str] = "timm"

    name: str
    patch_size: int | None = None
    keep_prefix_tokens: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check(isinstance(self.name, str), "TimmConfig.name", self.name, "the name of a model of timm")
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(key), to_tuples(value)) for key, value in pairs)))
        _structure(self)  # names are checked where they are given

    @property
    def depth(self) -> int:
        return len(self.dims)

    @property
    def dims(self) -> tuple[int, ...]:
        return _structure(self).dims

    @property
    def strides(self) -> tuple[int, ...]:
        return _structure(self).strides

    @property
    def no_windows(self) -> str:
        return _structure(self).no_windows


@lru_cache(maxsize=64)
def _structure(config: TimmConfig) -> _Structure:
    """Builds the network without memory, once per configuration, to look at it."""
    from .branches.timm_factory import create_model, describe
    from .meta import on_meta

    with on_meta():
        model = create_model(
            config.name,
            patch_size=config.patch_size,
            keep_prefix_tokens=config.keep_prefix_tokens,
            options=dict(config.options),
        )
        return _Structure(*describe(model, config.name))
