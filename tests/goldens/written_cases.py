"""Recorded cases, and cases that a test writes, through the checkers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from checkers import CaseResult, find_cases, run_cases

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


def recorded(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was recorded of a case, and its tensors (none where it has no file of them)."""
    tensors = GOLDENS / f"{name}.safetensors"
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(tensors) if tensors.exists() else {}


def run_path(path: Path) -> CaseResult:
    """The result of the one case at a path."""
    (result,) = run_cases(find_cases([path]))
    return result


def run_written(folder: Path, info: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> CaseResult:
    """The result of a case that is written into a folder, beside what the golden case of its name has there."""
    path = folder / f"{info['name']}.json"
    path.write_text(json.dumps(info))
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".safetensors"))
    if "tokenizer_file" in info and not (folder / info["tokenizer_file"]).exists():
        shutil.copy(GOLDENS / info["tokenizer_file"], folder)
    for source in GOLDENS.glob(f"{info['name']}_*"):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
    return run_path(path)


def failed(result: CaseResult) -> list[str]:
    """Names of the comparisons that failed."""
    return [comparison.name for comparison in result.comparisons if not comparison.passed]
