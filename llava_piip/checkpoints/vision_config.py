"""What a published folder says of its vision tower, by the row that was named, by a Python file, or by its shapes."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piip_core import PIIPConfig, zoo
from piip_core.checkpoints import PublishedNames, to_ours
from piip_core.checkpoints.branch_names import branch_classes_of
from piip_core.checkpoints.public_config import config_from_public
from piip_core.errors import CheckpointError, NotSupportedYet

from .names import PUBLISHED_TOWER

_NORMS = {"gn": "group", "ln": "layer"}
_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class PublishedVision:
    """Vision tower and projector of a published model, and what tells them, in words."""

    config: PIIPConfig
    projector_norm: str
    projector_grid: int | None
    origin: str


def find_vision(
    shapes: Mapping[str, Sequence[int]],
    row: str | None,
    vision_config: str | os.PathLike[str] | None,
    clip_configs: Mapping[str, Mapping[str, Any]],
) -> PublishedVision:
    """What a published folder holds; for arguments and errors see `convert_folder`."""
    if row is not None or vision_config is None:
        entry = zoo.multimodal(row) if row is not None else recognise_row(shapes)
        origin = "the row that was named" if row is not None else f"recognised as {entry.name}"
        return PublishedVision(entry.vision, entry.projector_norm, None, origin)
    public = published_vision_config(Path(vision_config))
    backbone = {
        key: value | {"clip_config": clip_configs[value["pretrained"]]}
        if isinstance(value, Mapping) and value.get("pretrained") in clip_configs
        else value
        for key, value in public["backbone"].items()
    }
    norm = public["projector"].get("norm", "gn")
    if norm not in _NORMS:
        raise CheckpointError(f"{vision_config}: projector norm {norm!r}, expected one of {', '.join(_NORMS)}")
    config = config_from_public(backbone, _tower(shapes))
    grid = public["projector"].get("out_shape")
    return PublishedVision(config, _NORMS[norm], grid, f"the vision configuration {vision_config}")


def recognise_row(shapes: Mapping[str, Sequence[int]]) -> zoo.MultimodalEntry:
    """Finds the published row that a state dict belongs to; of rows that differ in their training alone the first.

    Args:
        shapes: Published name -> shape.

    Raises:
        CheckpointError: If no row fits.
    """
    width, tower = tuple(shapes.get(_EMBEDDINGS, ()))[-1:], _tower(shapes)
    for entry in zoo.multimodal_entries():
        if width == (entry.embed_dim,) and len(entry.vision.branches) > 1 and _fits(tower, entry.vision):
            return entry
    raise CheckpointError(
        "the tensors fit no published row; name it (--row), or give the vision configuration (--vision-config). Rows "
        "are " + ", ".join(entry.name for entry in zoo.multimodal_entries())
    )


def _tower(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes below the vision tower."""
    inside = {key: tuple(shape) for key, shape in shapes.items() if key.startswith(PUBLISHED_TOWER)}
    return {key.removeprefix(PUBLISHED_TOWER): shape for key, shape in inside.items()}


def _fits(tower: Mapping[str, tuple[int, ...]], config: PIIPConfig) -> bool:
    try:
        names = PublishedNames(config, branch_classes_of(tower, len(config.branches)), scale="weight")
    except (CheckpointError, NotSupportedYet):
        return False
    return to_ours({key: torch.empty(shape, device="meta") for key, shape in tower.items()}, names)[1].complete


def published_vision_config(path: Path) -> dict[str, Any]:
    """Reads `model = dict(backbone=..., projector=...)` from a Python file that has nothing but such assignments.

    Returns:
        The fields of `model`.

    Raises:
        CheckpointError: If the file has anything else than literals and calls of `dict`.
    """
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable Python file ({error})") from None
    names: dict[str, Any] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = _value(value, names, path)
            case ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case _:
                raise _unexpected(path, node)
    model = names.get("model")
    if not isinstance(model, Mapping) or not {"backbone", "projector"} <= set(model):
        raise CheckpointError(f"{path}: expected model = dict(backbone=..., projector=...)")
    return dict(model)


def _value(node: ast.expr, names: Mapping[str, Any], path: Path) -> Any:
    """A literal, a call of `dict`, or a name that was assigned before; nothing is executed."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: _value(keyword.value, names, path) for keyword in keywords}
        case ast.Dict(keys=keys, values=values) if all(key is not None for key in keys):
            return {_value(k, names, path): _value(v, names, path) for k, v in zip(keys, values, strict=True)}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names, path) for item in items]
        case ast.Name(id=name) if name in names:
            return names[name]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _unexpected(path, node) from None


def _unexpected(path: Path, node: ast.AST) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {getattr(node, 'lineno', '?')}: only assignments of literals and dict(...) are read, and "
        "nothing is executed; name the row instead (--row)"
    )
