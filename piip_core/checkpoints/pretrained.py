"""Pretrained weights of a single network into a branch, in every published format and in timm's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..branches import Branch
from ..classifier import PIIPClassifier
from ..errors import CheckpointError
from ..files import check_regular
from ..merging import ClassificationHeads
from ..pyramid import PIIP
from .branch_names import BRANCH_CLASSES
from .convert import ConversionReport
from .reading import read_checkpoint
from .rules import CLASS_TOKEN, PARTS, POSITION_TABLE, Rule, RuleTable, rename_parts

logger = logging.getLogger(__name__)

# Parts of pretrained networks that a branch does not have, nor the classifier behind it
_UNUSED_PARTS = {
    "cls_token": "the branch has no class token",
    "dist_token": "the branch has no distillation token",
    "reg_token": "the branch has no register tokens",
    "mask_token": "only used in masked pretraining",
    "attn_pool": "branches have no pooling",
    "proj": "branches have no projection to the space of texts",
    **dict.fromkeys(("norm", "fc_norm", "layernorm", "post_layernorm", "ln_post"), "branches have no final norm"),
    **dict.fromkeys(("head", "head_dist", "classifier"), "branches have no classifier"),
}
_INDEX = "relative_position_index"
_LAYER_SCALES = ("ls1.gamma", "ls2.gamma")
_POSITION_TABLE = "relative_position_bias_table"
# BEiT files from pretraining have one table for all blocks
_SHARED_TABLE = f"rel_pos_bias.{_POSITION_TABLE}"
# The image side of a model of images and texts: transformers' and open_clip's
_IMAGE_TOWERS = ("vision_model.", "visual.")
# Where libraries and the published models hold the network
_HOLDERS = (*_IMAGE_TOWERS, "trunk.", "convnext.", "convnext_model.", "clip_model.")
_OPEN_CLIP = (
    Rule("pos_embed", "positional_embedding", POSITION_TABLE),
    Rule("cls_token", "class_embedding", CLASS_TOKEN),
    *rename_parts(
        ("patch_embed.proj.weight", "conv1.weight"),
        ("norm_pre.*", "ln_pre.*"),
        ("blocks.*.norm*.*", "transformer.resblocks.*.ln_*.*"),
        ("blocks.*.attn.qkv.*", "transformer.resblocks.*.attn.in_proj_*"),
        ("blocks.*.attn.proj.*", "transformer.resblocks.*.attn.out_proj.*"),
        ("blocks.*.mlp.fc1.*", "transformer.resblocks.*.mlp.c_fc.*"),
        ("blocks.*.mlp.fc2.*", "transformer.resblocks.*.mlp.c_proj.*"),
    ),
)


def _without_holder(name: str) -> str:
    for prefix in _HOLDERS:
        name = name.removeprefix(prefix)
    return name


_TABLES = tuple(
    RuleTable(replace(rule, published=_without_holder(rule.published)) for rule in rules)
    for rules in (*BRANCH_CLASSES.values(), _OPEN_CLIP)
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
    if not isinstance(model, PIIPClassifier) or not isinstance(model.head, ClassificationHeads):
        return {}
    parts = {"norm": model.head.norms[str(number)]}
    if model.num_classes:
        parts["head"] = model.head.classifiers[str(number)]
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_branch(branch: Branch, source: str, *, head: Mapping[str, Tensor] | None = None) -> ConversionReport:
    """Loads pretrained weights into one branch.

    Args:
        branch: Any branch.
        source: `timm:NAME`, `open_clip:NAME/TAG`, or a path: .pth, .safetensors or a sharded checkpoint in the
            published formats (DeiT, DeiT III, AugReg, MAE, DINOv2, BEiT, BEiTv2, Uni-Perceiver, InternViT-6B, ConvNeXt
            and CLIP of transformers, CLIP of open_clip) or in timm's, or .npz as AugReg publishes it.
        head: Tensors of the branch's classifier under timm's names (norm.*, head.*); filled, too, where the source has
            them in the same shapes.

    Returns:
        The account of every key.

    Raises:
        CheckpointError: If the source cannot be had or does not fit; nothing is changed then.
    """
    state = read_source(source)
    head = head or {}
    found = {name: t for name, t in head.items() if name in state and state[name].shape == t.shape}
    target = branch.model.state_dict() | found  # shares memory with the parameters
    fitted, report = convert_pretrained(state, target, source=source)
    for name in (name for name in head if name not in found):
        report.note(f"{name} keeps its initial values: the file has none of shape {tuple(head[name].shape)}")
    report.check()
    for name, tensor in fitted.items():
        target[name].copy_(tensor)
    return report


def read_source(source: str) -> Mapping[str, Tensor]:
    """The state dict of a pretrained network, in the names of its publisher.

    Args:
        source: `KIND:NAME` with a kind of `_LIBRARIES`, or a path; see `load_branch`.

    Raises:
        CheckpointError: If it cannot be had.
    """
    kind, colon, name = source.partition(":")
    if not colon or kind not in _LIBRARIES:
        return _from_npz(Path(source)) if source.endswith(".npz") else read_checkpoint(source).state
    fetch = _LIBRARIES[kind](name)
    try:
        return fetch()
    except Exception as error:  # the hub client raises its own, httpx's and OSErrors, depending on what fails
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"the weights {source} could not be downloaded ({reason[0]}). Without internet access, set "
            "BranchConfig.pretrained to the path of a local file, or to null to start from random weights"
        ) from error


_Fetch = Callable[[], Mapping[str, Tensor]]


def _from_timm(name: str) -> _Fetch:
    if not timm.is_model(name.split(".")[0]):
        raise CheckpointError(f"timm has no model {name!r}; timm.list_models(pretrained=True) lists them")
    return lambda: timm.create_model(name, pretrained=True).state_dict()


def _from_open_clip(name: str) -> _Fetch:
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
    return lambda: open_clip.create_model(model, pretrained=tag).visual.state_dict()


# Checks a name and says how its weights are downloaded. What else is fetched by name goes in here
_LIBRARIES: Mapping[str, Callable[[str], _Fetch]] = {"timm": _from_timm, "open_clip": _from_open_clip}


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
    tower = next((prefix for prefix in _IMAGE_TOWERS if any(key.startswith(prefix) for key in state)), "")
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key in state:
        if not key.startswith(tower):
            report.ignored[key] = "belongs to the text side"
            continue
        candidates = list(_candidates(key))
        found = [(name, part) for name, part in candidates if name in target][:1]
        if key == _SHARED_TABLE and not found:
            found = [(name, None) for name in target if name.endswith(_POSITION_TABLE)]
        if not found:
            _explain(key, candidates, report)
            continue
        report.used[key] = ", ".join(name for name, _ in found)
        for name, part in found:
            if part is None:
                converted[name] = _fit(name, state[key], target[name], report)
            else:
                parts.setdefault(name, {})[part] = state[key]
    for name, tensors in parts.items():
        if len(tensors) == PARTS:
            joined = torch.cat([tensors[i] for i in range(PARTS)])
            converted[name] = _fit(name, joined, target[name], report)
    # A file with some of them is broken
    scales = [name for name in target if name.endswith(_LAYER_SCALES)]
    if not any(name in converted for name in scales):
        report.filled |= dict.fromkeys(scales, "the file has no layer scale: it keeps its initial value")
    report.missing = [name for name in target if name not in converted and name not in report.filled]
    return converted, report


def _candidates(key: str) -> Iterator[tuple[str, int | None]]:
    """Our possible names for a key, by every published class; with the part of the tensor that it is."""
    bare = _without_holder(key)
    yield bare, None
    for table in _TABLES:
        found = table.to_ours(bare)
        if found is not None:
            yield found[0], found[1].part


def _explain(key: str, candidates: list[tuple[str, int | None]], report: ConversionReport) -> None:
    """Says why a key is not needed, if anybody knows."""
    reasons = [_UNUSED_PARTS.get(name.split(".")[0]) for name, _ in candidates]
    reasons.append("follows from the window" if key.split(".")[-1] == _INDEX else None)
    reason = next(filter(None, reasons), None)
    if reason is None:
        report.unexplained.append(key)
    else:
        report.ignored[key] = reason


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
        tensor = F.interpolate(tensor.float(), size=size, mode="bicubic", align_corners=False)
    report.compare(name, tensor.shape, target.shape)
    return tensor


def _fit_positions(table: Tensor, entries: int, report: ConversionReport) -> Tensor:
    if table.shape[1] == entries:
        return table
    (have, old), (keep, new) = _leading_entries(table.shape[1]), _leading_entries(entries)
    if old is None or new is None or keep > have:
        return table  # reported as a difference in shape
    if have > keep:
        report.note(f"{have - keep} leading position entries, of class tokens, dropped")
    if old != new:
        report.note(f"position grid resized from {old} x {old} to {new} x {new}")
    grid = resample_abs_pos_embed(table[:, have:].float(), [new, new], [old, old], num_prefix_tokens=0, antialias=False)
    return torch.cat((table[:, :keep], grid), dim=1)


def _leading_entries(entries: int) -> tuple[int, int | None]:
    """How many entries are before those of the patches, and the side of their square."""
    return next(((n, side) for n in range(3) if (side := _side(entries - n)) is not None), (0, None))


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


def resize_relative_positions(table: Tensor, side: int) -> Tensor:
    """Resizes a table (N ** 2, heads) to (side ** 2, heads) as BEiT does: cubic splines, denser near distance 0.

    The rows of the old table are taken as samples at distances that grow geometrically, 0, 1, 1 + q, 1 + q + q^2, ...,
    with the ratio q for which the outermost one reaches the outermost of the new table. timm's resizes linearly.
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
