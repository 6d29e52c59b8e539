"""Pretrained weights of a single network into a branch, in every published format and in timm's."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerScale, resample_abs_pos_embed
from torch import Tensor

from ..branches import Branch
from ..classifier import PIIPClassifier
from ..errors import CheckpointError
from ..pyramid import PIIP
from .branch_names import BRANCH_CLASSES
from .report import ConversionReport
from .rules import PARTS, Change, Rule, RuleTable, rename_parts
from .sources import read_source

__all__ = ["convert_pretrained", "load_branch", "load_pretrained", "resize_relative_positions"]


def resize_relative_positions(table: Tensor, side: int) -> Tensor:
    """Resizes a table of relative positions as BEiT does: cubic splines, denser near distance 0.

    The rows of the old table are taken as samples at distances that grow geometrically, 0, 1, 1 + q, 1 + q + q^2, ...,
    with the ratio q for which the outermost one reaches the outermost of the new table.

    Args:
        table: (N, heads), N an odd number squared, row by row.
        side: Rows and columns of the new table, odd.

    Returns:
        (side ** 2, heads) in fp32.
    """
    # Imported here: nothing else in this package needs SciPy
    from scipy.interpolate import RectBivariateSpline

    old = round(table.shape[0] ** 0.5)
    sources = _distances(old, side)
    wanted = np.arange(-(side // 2), side // 2 + 1)
    values = table.double().cpu().numpy().reshape(old, old, -1)
    resized = [
        RectBivariateSpline(sources, sources, values[..., head])(wanted, wanted) for head in range(values.shape[-1])
    ]
    return torch.from_numpy(np.stack(resized, axis=-1)).reshape(side * side, -1).to(table.device, torch.float32)


def _distances(old: int, new: int) -> np.ndarray:
    """Where the entries of an axis of the old table lie on the axis of the new one."""
    half = old // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # the published tolerance: the result depends on it in the sixth digit
        ratio = (low + high) / 2
        if sum(ratio**k for k in range(half)) > new // 2:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum(ratio ** np.arange(half))
    return np.concatenate((-positive[::-1], [0.0], positive))


logger = logging.getLogger(__name__)

# Parts of pretrained networks that a branch does not have, nor the classifier behind it
_UNUSED_PARTS = {
    "cls_token": "the branch has no class token",
    "dist_token": "the branch has no distillation token",
    "reg_token": "the branch has no register tokens",
    "mask_token": "only used in masked pretraining",
    "norm": "branches have no final norm",
    "fc_norm": "branches have no final norm",
    "attn_pool": "branches have no pooling",
    "layernorm": "branches have no final norm",
    "post_layernorm": "branches have no final norm",
    "ln_post": "branches have no final norm",
    "proj": "branches have no projection to the space of texts",
    "head": "branches have no classifier",
    "head_dist": "branches have no classifier",
    "classifier": "branches have no classifier",
}
_INDEX = "relative_position_index"
_LAYER_SCALES = ("ls1.gamma", "ls2.gamma")
_POSITION_TABLE = "relative_position_bias_table"
# BEiT files from pretraining have one table for all blocks
_SHARED_TABLE = f"rel_pos_bias.{_POSITION_TABLE}"
# Where libraries hold the network, and where the published models do
_HOLDERS = {"convnext.": "convnext_model.", "vision_model.": "clip_model.", "trunk.": ""}
# The image side of a model of images and texts: transformers' and open_clip's
_IMAGE_TOWERS = ("vision_model.", "visual.")
_OPEN_CLIP = (
    Rule("pos_embed", "positional_embedding", Change.POSITION_TABLE),
    Rule("cls_token", "class_embedding", Change.CLASS_TOKEN),
    *rename_parts(
        ("patch_embed.proj.weight", "conv1.weight"),
        ("norm_pre.*", "ln_pre.*"),
        ("blocks.*.norm1.*", "transformer.resblocks.*.ln_1.*"),
        ("blocks.*.attn.qkv.weight", "transformer.resblocks.*.attn.in_proj_weight"),
        ("blocks.*.attn.qkv.bias", "transformer.resblocks.*.attn.in_proj_bias"),
        ("blocks.*.attn.proj.*", "transformer.resblocks.*.attn.out_proj.*"),
        ("blocks.*.norm2.*", "transformer.resblocks.*.ln_2.*"),
        ("blocks.*.mlp.fc1.*", "transformer.resblocks.*.mlp.c_fc.*"),
        ("blocks.*.mlp.fc2.*", "transformer.resblocks.*.mlp.c_proj.*"),
    ),
)


def load_pretrained(model: PIIP | PIIPClassifier) -> dict[int, ConversionReport]:
    """Loads the weights that each branch of a pyramid names in `BranchConfig.pretrained`.

    A classifier with separate heads gets their norms and classifiers, too, where the sizes are the same; another number
    of classes leaves the classifiers at random.

    Returns:
        The account of every branch that names some, by its number (from 1).

    Raises:
        CheckpointError: If a source cannot be had or does not fit; the message names branch, source and fix.
    """
    reports = {}
    pyramid = model.pyramid if isinstance(model, PIIPClassifier) else model
    for number, branch in enumerate(pyramid.branches, 1):
        source = branch.config.pretrained
        if source is None:
            continue
        try:
            reports[number] = load_branch(branch, source, head=_head(model, number))
        except CheckpointError as error:
            raise CheckpointError(f"branch {number}: {error}") from None
        logger.info("branch %d: %s", number, reports[number].summary())
    return reports


def _head(model: PIIP | PIIPClassifier, number: int) -> dict[str, Tensor]:
    """Norm and classifier of a branch, as timm names them; nothing where it has none of its own."""
    if not isinstance(model, PIIPClassifier) or model.config.head != "separate":
        return {}
    parts = {"norm": model.head.norms[str(number)]}
    if model.num_classes:
        parts["head"] = model.head.classifiers[str(number)]
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_branch(
    branch: Branch,
    source: str,
    *,
    head: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    allow_incomplete: bool = False,
) -> ConversionReport:
    """Loads pretrained weights into one branch, a tensor at a time: nothing large is in memory twice.

    Args:
        branch: Any branch. One that was built on the meta device gets its memory here, and never any random weights.
        source: `timm:NAME`, `open_clip:NAME/TAG`, or a path: .pth, .safetensors or a sharded checkpoint in the
            published formats (DeiT, DeiT III, AugReg, MAE, DINOv2, BEiT, BEiTv2, Uni-Perceiver, InternViT-6B, ConvNeXt
            and CLIP of transformers, CLIP of open_clip) or in timm's, or .npz as AugReg publishes it.
        head: Tensors of the branch's classifier under timm's names (norm.*, head.*); filled, too, where the source has
            them in the same shapes.
        device: Where to put a branch that is on the meta device.
        allow_incomplete: Go on although some keys have no explanation.

    Returns:
        The account of every key.

    Raises:
        CheckpointError: If the source cannot be had or does not fit; also if it lacks weights that a branch from the
            meta device needs, whatever `allow_incomplete` says.
    """
    state = read_source(source)
    on_meta = any(parameter.is_meta for parameter in branch.parameters())
    report = ConversionReport(source=source)
    head = _available(head or {}, state, report)
    plan = _plan(state, branch.model.state_dict() | head, report)
    report.check(allow_incomplete=allow_incomplete and not (on_meta and report.missing))  # before anything is changed
    if on_meta:
        _materialise(branch, device)
    target = branch.model.state_dict() | head  # shares memory with the parameters
    for name, tensor in _fitted(state, plan, target, report):
        if name not in report.mismatched:
            target[name].copy_(tensor)
    report.check(allow_incomplete=allow_incomplete)
    return report


def _available(head: Mapping[str, Tensor], state: Mapping[str, Tensor], report: ConversionReport) -> dict[str, Tensor]:
    """The tensors of a head that a source has in the same shapes; the others are noted."""
    found = {}
    for name, tensor in head.items():
        shape = tuple(state[name].shape) if name in state else None
        if shape == tuple(tensor.shape):
            found[name] = tensor
        else:
            has = "no such tensor" if shape is None else f"shape {shape}"
            report.note(f"{name} of shape {tuple(tensor.shape)} keeps its initial values: the file has {has}")
    return found


def _materialise(branch: Branch, device: torch.device | str) -> None:
    """Gives a branch memory, and those of its tensors that no file holds their values."""
    branch.to_empty(device=device)
    for module in branch.modules():
        if isinstance(module, LayerScale):
            module.reset_parameters()
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


def convert_pretrained(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, source: str = "checkpoint"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Brings pretrained weights into the names and shapes of a branch.

    As published, position embeddings lose the entries of class tokens and are resized bicubically, without
    antialiasing, to the grid of the branch; so is a patch kernel of another size, without rescaling its values.
    Relative positions are resized to the window; see `resize_relative_positions`.

    Args:
        state: State dict of the pretrained network, in a published format's or timm's names.
        target: State dict of the branch's network (timm's names), for names and shapes.
        source: Name of the weights, for messages.

    Returns:
        What `state` provides of `target`, and the account; call its `check`.
    """
    report = ConversionReport(source=source)
    plan = _plan(state, target, report)
    return dict(_fitted(state, plan, target, report)), report


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the source goes: our names, and the part of them it is if they are joined from parts."""

    names: tuple[str, ...]
    part: int | None = None


def _plan(keys: Collection[str], target: Mapping[str, Tensor], report: ConversionReport) -> dict[str, _Place]:
    """Where each key goes; fills in the account as far as names tell."""
    tables = [RuleTable(rules) for rules in (*BRANCH_CLASSES.values(), _OPEN_CLIP)]
    tower = next((prefix for prefix in _IMAGE_TOWERS if any(key.startswith(prefix) for key in keys)), "")
    plan: dict[str, _Place] = {}
    for key in keys:
        if not key.startswith(tower):
            report.ignored[key] = "belongs to the text side"
            continue
        candidates = list(_candidates(key, tables))
        name, part = next((found for found in candidates if found[0] in target), (None, None))
        unused = (_UNUSED_PARTS.get(found.split(".")[0]) for found, _ in candidates)
        if name is not None:
            plan[key] = _Place((name,), part)
        elif key == _SHARED_TABLE:
            plan[key] = _Place(tuple(name for name in target if name.endswith(_POSITION_TABLE)))
        elif key.split(".")[-1] == _INDEX:
            report.ignored[key] = "follows from the window"
        elif (reason := next(filter(None, unused), None)) is not None:
            report.ignored[key] = reason
        else:
            report.unexplained.append(key)
    report.used |= {key: ", ".join(place.names) for key, place in plan.items()}
    provided = _provided(plan)
    _fill_layer_scales(provided, target, report)
    report.missing = [name for name in target if name not in provided and name not in report.filled]
    return plan


def _provided(plan: Mapping[str, _Place]) -> set[str]:
    """Our names that a plan gives a value, all parts of it."""
    parts = Counter(name for place in plan.values() if place.part is not None for name in place.names)
    return {name for place in plan.values() for name in place.names if parts.get(name, PARTS) == PARTS}


def _candidates(key: str, tables: list[RuleTable]) -> Iterator[tuple[str, int | None]]:
    """Our possible names for a key: its own, and those of each published class; with the part of it that it is."""
    bare, published = _without_holder(key.removeprefix("visual."))
    yield key, None
    yield bare, None
    for text in dict.fromkeys((key, published, bare, *(holder + bare for holder in _HOLDERS.values()))):
        for table in tables:
            found = table.to_ours(text)
            if found is not None:
                yield found[0], found[1].part


def _without_holder(key: str) -> tuple[str, str]:
    """A key without the prefix under which a library holds the network, and as the published models call it."""
    for holder, published in _HOLDERS.items():
        if key.startswith(holder):
            bare = key.removeprefix(holder)
            return bare, published + bare
    return key, key


def _fitted(
    state: Mapping[str, Tensor],
    plan: Mapping[str, _Place],
    target: Mapping[str, Tensor],
    report: ConversionReport,
) -> Iterator[tuple[str, Tensor]]:
    parts: dict[str, dict[int, Tensor]] = {}
    for key, place in plan.items():
        tensor = state[key].float()
        if place.part is not None:
            (name,) = place.names
            found = parts.setdefault(name, {})
            found[place.part] = tensor
            if len(found) < PARTS:
                continue
            tensor = torch.cat([found[i] for i in range(PARTS)])
            del parts[name]
        for name in place.names:
            yield name, _fit(name, tensor, target[name], report)


def _fit(name: str, tensor: Tensor, target: Tensor, report: ConversionReport) -> Tensor:
    if name == "pos_embed":
        tensor = _fit_positions(tensor[None] if tensor.ndim == 2 else tensor, target.shape[1], report)
    elif name == "cls_token" and tensor.ndim == 1:
        tensor = tensor[None, None]
    elif name.endswith(_POSITION_TABLE):
        tensor = _fit_relative_positions(tensor, target.shape[0], report)
    elif name == "patch_embed.proj.weight" and tensor.shape[-2:] != target.shape[-2:]:
        size = tuple(target.shape[-2:])
        report.note(f"patch kernel resized from {tuple(tensor.shape[-2:])} to {size}")
        tensor = F.interpolate(tensor, size=size, mode="bicubic", align_corners=False)
    if tensor.shape != target.shape:
        report.mismatched[name] = f"shape {tuple(tensor.shape)} in the file, {tuple(target.shape)} in the branch"
    return tensor


def _fit_positions(table: Tensor, entries: int, report: ConversionReport) -> Tensor:
    if table.shape[1] == entries:
        return table
    have, keep = _leading_entries(table.shape[1]), _leading_entries(entries)
    if have is None or keep is None or keep > have:
        return table  # reported as a difference in shape
    if have > keep:
        report.note(f"{have - keep} leading position entries, of class tokens, dropped")
    old, new = _side(table.shape[1] - have), _side(entries - keep)
    if old != new:
        report.note(f"position grid resized from {old} x {old} to {new} x {new}")
    grid = resample_abs_pos_embed(table[:, have:], (new, new), (old, old), num_prefix_tokens=0, antialias=False)
    return torch.cat((table[:, :keep], grid), dim=1)


def _leading_entries(entries: int) -> int | None:
    """Entries before those of the patches, of which there is a square number."""
    return next((n for n in range(3) if _side(entries - n) is not None), None)


def _fit_relative_positions(table: Tensor, entries: int, report: ConversionReport) -> Tensor:
    rows = table.shape[0]
    if rows == entries:
        return table
    if _side(rows) is None and _side(rows - 3) is not None:
        report.note("3 relative positions, of class tokens, dropped")
        table = table[:-3]
    old, new = _side(table.shape[0]), _side(entries)
    if old is None or new is None or old == new:
        return table
    report.note(f"relative positions resized from {old} x {old} to {new} x {new}")
    return resize_relative_positions(table, new)


def _side(entries: int) -> int | None:
    side = round(entries**0.5)
    return side if side * side == entries else None


def _fill_layer_scales(provided: Collection[str], target: Mapping[str, Tensor], report: ConversionReport) -> None:
    """A file without any layer scale leaves those of the branch as they are; one with some of them is broken."""
    scales = [name for name in target if name.endswith(_LAYER_SCALES)]
    if not any(name in provided for name in scales):
        report.filled |= dict.fromkeys(scales, "the file has no layer scale: it keeps its initial value")
