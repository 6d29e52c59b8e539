"""Presets: YAML files with the arguments of a run, each naming the one it builds on."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from piip_core import zoo
from piip_core.errors import ConfigError
from piip_core.zoo.ablations import CHAT_ABLATIONS

from .arguments import DataArguments, ModelArguments, PIIPTrainingArguments

_FOLDER = Path(__file__).with_name("presets")
_ARGUMENTS = (ModelArguments, DataArguments, PIIPTrainingArguments)


def list_presets() -> list[str]:
    """Names of the presets that come with the package: for each row of the zoo its stages, and those without a row."""
    names = [*(entry.name for entry in zoo.multimodal_entries()), *CHAT_ABLATIONS]
    rows = [f"{name}/{stage}" for name in names for stage in ("stage1", "stage2")]
    stages = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    rows += [f"{entry.name}/{stage}" for entry in zoo.chat_models() for stage in stages]
    return sorted([*rows, *stages])


def load_preset(name: str | Path) -> dict[str, Any]:
    """Reads a preset with all that it builds on.

    Args:
        name: A name from `list_presets`, or the path of a YAML file. Its key `base` names another preset, or a file
            relative to this one, whose values it overrides.

    Raises:
        ConfigError: If a file is missing or no mapping, has an unknown key, or bases go in a circle.
    """
    return _load(str(name), Path(), ())


def parse_arguments(
    arguments: Sequence[str],
) -> tuple[ModelArguments, DataArguments, PIIPTrainingArguments]:
    """Arguments of a run from a command line: `[PRESET] [--key value ...]`."""
    parser = _Parser(
        _ARGUMENTS,
        prog="python -m llava_piip.train",
        description="Trains PIIP-LLaVA, in one process with --deepspeed none. On all GPUs: deepspeed "
        "llava_piip/train/train.py "
        "piip_llava_clip_bl_512_256_7b/stage1 --annotations blip_laion_cc_sbu_558k.json "
        "--image_root LLaVA-Pretrain/images --output_dir runs/stage1",
        epilog=f"presets: {', '.join(list_presets())}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    preset = "name of a preset (below), or a YAML file; keys that follow override its values"
    parser.add_argument("preset", nargs="?", metavar="PRESET", help=preset)
    chosen, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(f"{unknown[0]!r}: no such argument{_close_to(unknown[0], _fields())}")
    if chosen.preset:
        parser.set_defaults(**load_preset(chosen.preset))
    model, data, training, _ = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    return model, data, training


class _Parser(HfArgumentParser):
    """Mistakes become our errors instead of pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists all arguments")


def _load(name: str, beside: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    row, _, stage = name.rpartition("/")
    if name in list_presets() and row:
        content, entry = _load(stage, _FOLDER, chain) | {"model": row}, zoo.multimodal(row)
        content["images_as_viewed"] = entry.max_pixels is not None  # no published result depends on it there
        if stage != "stage1":
            content["chat_template"] = entry.chat_template
        if stage == "stage1":
            content["train_parts"] = list(entry.first_stage)
        elif row.startswith("llava_1_5"):  # which leaves its vision tower as it is
            content["train_parts"] = ["projector", "language_model"]
        return content
    path = _find(name, beside)
    if path in chain:
        raise ConfigError(f"{path}: builds on itself, by way of {' -> '.join(p.name for p in chain)}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    base, fields = content.pop("base", None), _fields()
    for key, value in content.items():
        if key not in fields:
            raise ConfigError(f"{path}: {key!r}: no such argument{_close_to(str(key), fields)}")
        if isinstance(value, list) and "list" not in str(fields[key].type):
            raise ConfigError(f"{path}: {key}={value!r}: expected a single value")
        if isinstance(value, str) and "list" in str(fields[key].type):
            content[key] = [value]
    return (_load(str(base), path.parent, (*chain, path)) if base else {}) | content


def _find(name: str, beside: Path) -> Path:
    for candidate in (beside / name, _FOLDER / f"{name}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(f"preset {name!r}: no such preset or file{_close_to(name, list_presets())}")


def _fields() -> dict[str, dataclasses.Field]:
    return {field.name: field for cls in _ARGUMENTS for field in dataclasses.fields(cls) if field.init}


def _close_to(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lstrip("-").split("=")[0], known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; --help lists all"
