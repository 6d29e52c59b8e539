"""Prints what a bug report needs: versions, compilers, GPU, the compiled operator (or why not), what extras lack.

Run `python -m piip_core.doctor`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from piip_core.ops import ms_deform_attn, ms_deform_attn_reference, operator_status

# Oldest and newest release that the tests passed with, docs/environments.md; those of pyproject.toml in between.
TESTED = {
    "torch": ("2.10.0", "2.15.0"),
    "torchvision": ("0.25.0", "0.29.2"),
    "timm": ("1.0.31", "1.0.31"),
    "transformers": ("5.16.1", "5.24.0"),
    "accelerate": ("1.15.0", "1.15.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "peft": ("0.21.0", "0.21.2"),
    "open_clip_torch": ("3.3.0", "3.3.0"),
    "gradio": ("6.31.0", "6.31.0"),
}

ENVIRONMENT = ("CUDA_HOME", "FORCE_CUDA", "PIIP_DISABLE_EXTENSION", "PIIP_CPU_CAPABILITY", "OMP_NUM_THREADS")


def collect() -> dict[str, Any]:
    """Gathers the report as nested dictionaries of JSON types; starts compilers with --version, nothing else."""
    requirements = _read_requirements()
    names = sorted({requirement.name for requirement in requirements} | set(TESTED))
    return {
        "system": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "cpu_count": os.cpu_count(),
        },
        "packages": {name: installed_version(name) or "not installed" for name in names},
        "detectron2_commit": _find_detectron2_commit(),
        "untested": untested() or "nothing: all versions are among those tested",
        "torch": _torch_facts(),
        "build_tools": {
            "c++": _find_tool(os.environ.get("CXX", "c++")),
            "ninja": _find_tool("ninja"),
            "nvcc": _find_tool("nvcc", r"release [\d.]+, V[\d.]+"),
        },
        "environment": {name: os.environ.get(name, "not set") for name in ENVIRONMENT},
        "operator": _operator_facts(),
        "extras": _check_extras(requirements),
    }


def _find_tool(program: str, pattern: str = ".+") -> str | None:
    """Path and version of a program, None if it is not on the PATH or does not run."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    found = re.search(pattern, text)
    return f"{path}: {found.group() if found else 'unknown version'}"


def _torch_facts() -> dict[str, Any]:
    available = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() * available)]
    return {
        "cuda_build": torch.version.cuda,
        "cuda_available": available,
        "gpus": [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus],
        "threads": torch.get_num_threads(),
    }


def _operator_facts() -> dict[str, Any]:
    status, none = operator_status, "none: PyTorch reference"
    major, minor = divmod(status.cuda_version or 0, 1000)
    return {
        "compiled": status.compiled,
        "reason": status.reason,
        "cpu_kernels": status.cpu_capability or none,
        "cuda_kernels": f"CUDA {major}.{minor // 10}" if major else "Triton" if "cuda" in status.triton else none,
        "build": status.build,
        "self_test": {device: _self_test(device) for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()},
    }


def _self_test(device: str) -> str:
    """Compares one small call with the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(2, 20, 3, 6, generator=generator)
    locations = 1.2 * torch.rand(2, 7, 3, 1, 4, 2, generator=generator) - 0.1
    weights = torch.rand(2, 7, 3, 1, 4, generator=generator)
    expected = ms_deform_attn_reference(value.double(), [4, 5], locations.double(), weights.double())
    try:
        result = ms_deform_attn(value.to(device), [(4, 5)], locations.to(device), weights.to(device)).cpu()
    except RuntimeError as error:
        return f"failed: {error}"
    difference = (result - expected).abs().max().item()
    return f"{'ok' if difference < 1e-5 else 'WRONG'}, largest difference from float64 {difference:.1e}"


def _read_requirements() -> list[Requirement]:
    """What this project's own metadata asks for; empty where it is not installed."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires("piip") or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _check_extras(requirements: list[Requirement]) -> dict[str, str]:
    """For each extra of this project whether its packages are there, and which are not."""
    found = {}
    for extra in sorted(set(re.findall(r'extra == "([\w-]+)"', " ".join(str(each.marker) for each in requirements)))):
        lacking = {}
        for requirement in _of_extra(requirements, extra):
            version = installed_version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                lacking[requirement.name] = f"{requirement.name}{requirement.specifier} ({version or 'not installed'})"
        remedy = f": pip install --no-build-isolation -e '.[{extra}]'"
        found[extra] = f"needs {', '.join(lacking.values())}{remedy}" if lacking else "ready"
    return found


def _of_extra(requirements: list[Requirement], extra: str) -> Iterator[Requirement]:
    for requirement in requirements:
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name != "piip":
            yield requirement
        for other in requirement.extras if requirement.name == "piip" else ():
            yield from _of_extra(requirements, other)


def _find_detectron2_commit() -> str | None:
    """Detectron2 is on no package index and has no releases: its commit says which one it is."""
    try:
        origin = importlib.metadata.distribution("detectron2").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None


def installed_version(package: str) -> str | None:
    """Version of an installed package by its name on the package index; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def untested() -> list[str]:
    """One sentence for every installed library that is older or newer than all that this release was tested with."""
    lines = []
    for package, (oldest, newest) in TESTED.items():
        found = installed_version(package)
        try:
            version = found and Version(Version(found).public)  # 2.14.1+cu130 is 2.14.1
        except InvalidVersion:
            lines.append(f"{package} {found} has no version that compares with those tested ({oldest} to {newest})")
            continue
        if version and version > Version(newest):
            lines.append(f"{package} {found} is newer than anything this release was tested with (up to {newest})")
        elif version and version < Version(oldest):
            lines.append(f"{package} {found} is older than anything this release was tested with (from {oldest})")
    return lines


def format_report(report: dict[str, Any], indent: str = "") -> str:
    """The report as indented text."""
    lines = []
    for key, entry in report.items():
        if isinstance(entry, dict):
            lines += [f"{indent}{key}:", format_report(entry, indent + "  ")]
        else:
            text = ", ".join(map(str, entry)) or "none" if isinstance(entry, list) else entry
            lines.append(f"{indent}{key}: {'not found' if text is None else text}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_report(collect()))
