"""Where pretrained weights come from: timm, open_clip, or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..errors import CheckpointError
from ..files import check_regular
from .read import read_checkpoint

__all__ = ["read_source"]


def read_source(source: str) -> Mapping[str, Tensor]:
    """The state dict of a pretrained network, in the names of its publisher.

    Args:
        source: `timm:NAME`, `open_clip:NAME/TAG`, or a path; see `load_branch`.

    Raises:
        CheckpointError: If it cannot be had.
    """
    kind, colon, name = source.partition(":")
    if colon and kind in _LIBRARIES:
        return _LIBRARIES[kind](name)
    if Path(source).suffix == ".npz":
        return _from_npz(Path(source))
    return read_checkpoint(source).state


def _from_timm(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.split(".")[0]):
        raise CheckpointError(f"timm has no model {name!r}; timm.list_models(pretrained=True) lists them")
    return _downloaded(f"timm:{name}", lambda: timm.create_model(name, pretrained=True).state_dict())


def _from_open_clip(name: str) -> dict[str, Tensor]:
    try:
        import open_clip
    except ImportError:
        raise CheckpointError(
            f"open_clip:{name} needs the package open_clip_torch: pip install open_clip_torch"
        ) from None
    model, _, tag = name.partition("/")
    if (model, tag) not in open_clip.list_pretrained():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        hint = f"tags of {model} are {tags}" if tags else "expected open_clip:NAME/TAG from open_clip.list_pretrained()"
        raise CheckpointError(f"open_clip has no weights {name!r}; {hint}")
    return _downloaded(f"open_clip:{name}", lambda: open_clip.create_model(model, pretrained=tag).visual.state_dict())


def _downloaded(source: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return make()
    except Exception as error:  # the hub client raises its own, httpx's and OSErrors, depending on what fails
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"the weights {source} could not be downloaded ({reason[0]}). Without internet access, set "
            "BranchConfig.pretrained to the path of a local file, or to null to start from random weights"
        ) from error


_LIBRARIES: Mapping[str, Callable[[str], dict[str, Tensor]]] = {"timm": _from_timm, "open_clip": _from_open_clip}


def _from_npz(path: Path) -> dict[str, Tensor]:
    """AugReg's own format, read by timm into a network of the file's sizes."""
    check_regular(path, CheckpointError)
    try:
        with np.load(path) as arrays:
            kernel = arrays["embedding/kernel"].shape
            entries = arrays["Transformer/posembed_input/pos_embedding"].shape[1]
            classes = arrays["head/bias"].shape[0]
            block = "Transformer/encoderblock_{}/"
            depth = sum(f"{block.format(i)}LayerNorm_0/scale" in arrays for i in range(len(arrays)))
            heads = arrays[block.format(0) + "MultiHeadDotProductAttention_1/query/kernel"].shape[1]
            hidden = arrays[block.format(0) + "MlpBlock_3/Dense_0/kernel"].shape[1]
        model = VisionTransformer(
            img_size=round((entries - 1) ** 0.5) * kernel[0],
            patch_size=kernel[0],
            embed_dim=kernel[-1],
            depth=depth,
            num_heads=heads,
            mlp_ratio=hidden / kernel[-1],
            num_classes=classes,
        )
        model.load_pretrained(str(path))
    except Exception as error:  # of any type, depending on which bytes are wrong
        raise CheckpointError(f"{path}: not a ViT in the .npz format of AugReg ({error})") from None
    return model.state_dict()
