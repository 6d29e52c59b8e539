"""Golden cases: recorded inputs, weights and results of the public implementation (json + safetensors)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# How tensors that record results begin; the others are inputs, weights, or helpers such as reference points
RESULTS = ("output", "inter", "grad")


class GoldenError(ValueError):
    """A path is no golden case, or a case lacks what its family needs."""


@dataclass(frozen=True)
class GoldenCase:
    """One case.

    Attributes:
        path: The json file; the tensors lie beside it under the same name.
        info: Content of the json file.
    """

    path: Path
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def family(self) -> str:
        return self.info["family"]

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the public configuration."""
        return self.info["config"]

    @property
    def atol(self) -> float:
        """Largest allowed difference, relative to max(1, largest absolute value of the reference)."""
        return self.info["tolerance"]["atol"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in the types of the file, on PyTorch's default device."""
        path = self.path.with_suffix(".safetensors")
        if not path.is_file():
            raise GoldenError(f"{path}: missing; {self.path.name} needs its tensors beside it")
        return load_file(path, device=str(torch.get_default_device()))

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under a prefix such as "state.", without it; halves, which only save space, become float32."""
        found = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return {key: value.float() if value.dtype == torch.float16 else value for key, value in found.items()}

    @cached_property
    def results(self) -> dict[str, Tensor]:
        """Everything to compare with: outputs, intermediate features, gradients; nothing for a case without tensors."""
        if not self.path.with_suffix(".safetensors").is_file():
            return {}
        return {key: value for key, value in self.tensors.items() if key.split(".")[0] in RESULTS}


def find_cases(paths: Iterable[str | os.PathLike[str]]) -> list[GoldenCase]:
    """Reads the golden cases among files and below folders, each once; those of a folder sorted by name.

    Raises:
        GoldenError: If a path does not exist, a named file is no golden case, or nothing is found.
    """
    cases: dict[Path, GoldenCase] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = [case for file in sorted(path.rglob("*.json")) if (case := _read(file)) is not None]
        else:
            case = _read(path.with_suffix(".json"))
            if case is None:
                raise GoldenError(f"{path}: not a golden case; expected NAME.json with the fields 'name' and 'family'")
            found = [case]
        cases |= {case.path: case for case in found}
    if not cases:
        raise GoldenError(f"no golden cases in {', '.join(map(str, paths))}; expected NAME.json and NAME.safetensors")
    return list(cases.values())


def _read(path: Path) -> GoldenCase | None:
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise GoldenError(f"{path}: not a json file ({error})") from None
    return GoldenCase(path, info) if isinstance(info, dict) and {"name", "family"} <= set(info) else None
