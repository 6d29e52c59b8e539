"""The vision configuration beside a published checkpoint: a Python file, read without running it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piip_core.errors import CheckpointError

__all__ = ["published_vision_config"]


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
