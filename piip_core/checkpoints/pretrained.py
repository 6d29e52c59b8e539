"""Pretrained weights of a single network into a branch: DeiT, DeiT III, AugReg, MAE, and what timm names like them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..branches import Branch
from ..errors import CheckpointError
from ..pyramid import PIIP
from .files import read_checkpoint
from .names import BRANCH_CLASSES
from .report import ConversionReport
from .rules import RuleTable

__all__ = ["convert_pretrained", "load_branch", "load_pretrained"]

logger = logging.getLogger(__name__)

TIMM = "timm:"

# Parts of pretrained networks that a branch without a classifier does not have
_UNUSED_PARTS = {
    "cls_token": "the branch has no class token",
    "dist_token": "the branch has no distillation token",
    "mask_token": "only used in masked pretraining",
    "norm": "branches have no final norm",
    "fc_norm": "branches have no final norm",
    "head": "branches have no classifier",
    "head_dist": "branches have no classifier",
}
_LAYER_SCALES = ("ls1.gamma", "ls2.gamma")


def load_pretrained(pyramid: PIIP) -> dict[int, ConversionReport]:
    """Loads the weights that each branch of a pyramid names in `BranchConfig.pretrained`.

    Returns:
        The account of every branch that names some, by its number (from 1).

    Raises:
        CheckpointError: If a source cannot be had or does not fit; the message names branch, source and fix.
    """
    reports = {}
    for number, branch in enumerate(pyramid.branches, 1):
        source = branch.config.pretrained
        if source is None:
            continue
        try:
            reports[number] = load_branch(branch, source)
        except CheckpointError as error:
            raise CheckpointError(f"branch {number}: {error}") from None
        logger.info("branch %d: %s", number, reports[number].summary())
    return reports


def load_branch(branch: Branch, source: str, *, allow_incomplete: bool = False) -> ConversionReport:
    """Loads pretrained weights into one branch.

    Args:
        branch: A plain vision transformer.
        source: `timm:NAME`, or the path of a file: .pth or .safetensors in the published formats (DeiT, DeiT III,
            AugReg, MAE), or .npz as AugReg publishes them.
        allow_incomplete: Go on although some keys have no explanation.

    Returns:
        The account of every key.

    Raises:
        CheckpointError: If the source cannot be had or does not fit.
    """
    state, report = convert_pretrained(_read_source(source), branch.model.state_dict(), source=source)
    report.check(allow_incomplete=allow_incomplete)
    branch.model.load_state_dict(state, strict=False)
    return report


def convert_pretrained(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, source: str = "checkpoint"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Brings pretrained weights into the names and shapes of a branch.

    As published, position embeddings lose the entries of class tokens and are resized bicubically, without
    antialiasing, to the grid of the branch; so is a patch kernel of another size, without rescaling its values.

    Args:
        state: State dict of the pretrained network, in DeiT's or timm's names.
        target: State dict of the branch's network (timm's names), for names and shapes.
        source: Name of the weights, for messages.

    Returns:
        What `state` provides of `target`, and the account; call its `check`.
    """
    report = ConversionReport(source=source)
    # The names of the two published classes differ only in the layer scales, so one of them knows every file
    table = RuleTable([*BRANCH_CLASSES["deit"], *BRANCH_CLASSES["internvit"]])
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = table.to_ours(key)
        name = found[0] if found is not None else key
        if name in target:
            converted[name] = _fit(name, tensor.float(), target[name], report)
            report.used[key] = name
        elif key.split(".")[0] in _UNUSED_PARTS:
            report.ignored[key] = _UNUSED_PARTS[key.split(".")[0]]
        else:
            report.unexplained.append(key)
    _fill_layer_scales(converted, target, report)
    report.missing = [name for name in target if name not in converted and name not in report.filled]
    return converted, report


def _fit(name: str, tensor: Tensor, target: Tensor, report: ConversionReport) -> Tensor:
    if name == "pos_embed":
        tensor = _fit_positions(tensor, target.shape[1], report)
    elif name == "patch_embed.proj.weight" and tensor.shape[-2:] != target.shape[-2:]:
        size = tuple(target.shape[-2:])
        report.notes.append(f"patch kernel resized from {tuple(tensor.shape[-2:])} to {size}")
        tensor = F.interpolate(tensor, size=size, mode="bicubic", align_corners=False)
    if tensor.shape != target.shape:
        report.mismatched[name] = f"shape {tuple(tensor.shape)} in the file, {tuple(target.shape)} in the branch"
    return tensor


def _fit_positions(table: Tensor, entries: int, report: ConversionReport) -> Tensor:
    prefix = next((n for n in range(3) if _side(table.shape[1] - n) is not None), None)
    if prefix is None:
        return table  # reported as a difference in shape
    if prefix:
        report.notes.append(f"{prefix} leading position entries, of class tokens, dropped")
    old, new = _side(table.shape[1] - prefix), _side(entries)
    if old != new:
        report.notes.append(f"position grid resized from {old} x {old} to {new} x {new}")
    return resample_abs_pos_embed(table[:, prefix:], (new, new), (old, old), num_prefix_tokens=0, antialias=False)


def _side(entries: int) -> int | None:
    side = round(entries**0.5)
    return side if side * side == entries else None


def _fill_layer_scales(converted: dict[str, Tensor], target: Mapping[str, Tensor], report: ConversionReport) -> None:
    """A file without any layer scale leaves those of the branch as they are; one with some of them is broken."""
    scales = [name for name in target if name.endswith(_LAYER_SCALES)]
    if not any(name in converted for name in scales):
        report.filled |= dict.fromkeys(scales, "the file has no layer scale: it keeps its initial value")


def _read_source(source: str) -> dict[str, Tensor]:
    if source.startswith(TIMM):
        return _from_timm(source.removeprefix(TIMM))
    if Path(source).suffix == ".npz":
        return _from_npz(Path(source))
    return read_checkpoint(source).state


def _from_timm(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.split(".")[0]):
        raise CheckpointError(f"timm has no model {name!r}; timm.list_models(pretrained=True) lists them")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises its own, httpx's and OSErrors, depending on what fails
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"the weights {TIMM}{name} could not be downloaded ({reason[0]}). Without internet access, set "
            "BranchConfig.pretrained to the path of a local file, or to null to start from random weights"
        ) from error


def _from_npz(path: Path) -> dict[str, Tensor]:
    """AugReg's own format, read by timm into a network of the file's sizes."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with np.load(path) as arrays:
            kernel = arrays["embedding/kernel"].shape
            entries = arrays["Transformer/posembed_input/pos_embedding"].shape[1]
            classes = arrays["head/bias"].shape[0]
            block = "Transformer/encoderblock_{}/"
            depth = sum(f"{block.format(i)}LayerNorm_0/scale" in arrays for i in range(len(arrays)))
            heads = arrays[block.format(0) + "MultiHeadDotProductAttention_1/query/kernel"].shape[1]
            hidden = arrays[block.format(0) + "MlpBlock_3/Dense_0/kernel"].shape[1]
    except (KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a ViT in the .npz format of AugReg ({error})") from None
    model = VisionTransformer(
        img_size=_side(entries - 1) * kernel[0],
        patch_size=kernel[0],
        embed_dim=kernel[-1],
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / kernel[-1],
        num_classes=classes,
    )
    model.load_pretrained(str(path))
    return model.state_dict()
