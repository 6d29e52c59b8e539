"""Presets: YAML files with the arguments of a run, each naming the one it builds on."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from piip_core.errors import ConfigError

from .arguments import DataArguments, ModelArguments, PIIPTrainingArguments

_FOLDER = Path(__file__).with_name("presets")
_ARGUMENTS = (ModelArguments, DataArguments, PIIPTrainingArguments)


def list_presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def load_preset(name: str | Path) -> dict[str, Any]:
    """Reads a preset with all that it builds on.

    Args:
        name: A name from `list_presets`, or the path of a YAML file. Its key `base` names another preset, or a file
            relative to this one, whose values it overrides.

    Raises:
        ConfigError: If a file is missing or no mapping, has an unknown key, or bases go in a circle.
    """
    return _load(_find(str(name), None), ())


def parse_arguments(
    arguments: Sequence[str],
) -> tuple[ModelArguments, DataArguments, PIIPTrainingArguments]:
    """Arguments of a run from a command line: `[PRESET] [--key value ...]`.

    Raises:
        ConfigError: If a preset, a key or a value is not understood; the message names it and what is close.
    """
    parser = _Parser(
        _ARGUMENTS,
        prog="train.py",
        description="Trains PIIP-LLaVA. Example: deepspeed llava_piip/train/train.py "
        "piip_llava_clip_bl_512_256_7b/stage1 --annotations blip_laion_cc_sbu_558k.json "
        "--image_root LLaVA-Pretrain/images --output_dir runs/stage1",
        epilog=f"presets: {', '.join(list_presets())}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    preset = "name of a preset (below), or a YAML file; keys that follow override its values"
    parser.add_argument("preset", nargs="?", metavar="PRESET", help=preset)
    chosen, _ = parser.parse_known_args(list(arguments))
    if chosen.preset:
        parser.set_defaults(**load_preset(chosen.preset))
    model, data, training, _, unknown = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ConfigError(f"{unknown[0]!r}: no such argument{_close_to(unknown[0].lstrip('-'), dashes='--')}")
    return model, data, training


class _Parser(HfArgumentParser):
    """Mistakes become our errors instead of pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists all arguments")


def _load(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path in chain:
        raise ConfigError(
            f"{path}: builds on itself, by way of {' -> '.join(p.name for p in chain[chain.index(path) :])}"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    base = content.pop("base", None)
    fields = _fields()
    for key, value in content.items():
        if key not in fields:
            raise ConfigError(f"{path}: {key!r}: no such argument{_close_to(str(key))}")
        if isinstance(value, list) and "list" not in str(fields[key].type):
            raise ConfigError(f"{path}: {key}={value!r}: expected a single value")
        if isinstance(value, str) and "list" in str(fields[key].type):
            content[key] = [value]
    return (_load(_find(str(base), path), (*chain, path)) if base else {}) | content


def _find(name: str, beside: Path | None) -> Path:
    candidates = [Path(name) if beside is None else beside.parent / name, _FOLDER / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    close = difflib.get_close_matches(name, list_presets(), n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(list_presets())}"
    raise ConfigError(f"preset {name!r}: no such preset or file. {hint}")


def _fields() -> dict[str, dataclasses.Field]:
    return {field.name: field for cls in _ARGUMENTS for field in dataclasses.fields(cls) if field.init}


def _close_to(key: str, *, dashes: str = "") -> str:
    close = difflib.get_close_matches(key.split("=")[0], _fields(), n=3)
    return f"; did you mean {' or '.join(dashes + name for name in close)}?" if close else ""
