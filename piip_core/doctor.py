"""Prints what a bug report needs: versions, compilers, GPU, the compiled operator (or why not), what PIIP-LLaVA lacks.

Run `python -m piip_core.doctor`, with `--json` for machines.
"""

from __future__ import annotations

import argparse
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

__all__ = ["DETECTRON2_HINT", "LLAVA_HINT", "TESTED", "collect", "format_report", "installed_version", "untested"]

# Names on the package index by what they are needed for
PACKAGES = {
    "this project": ("piip",),
    "required": ("torch", "torchvision", "timm", "numpy", "safetensors", "pillow"),
    "below 81 for detectron2.model_zoo": ("setuptools",),
    "to compile the operator": ("ninja",),
    "extra: detection": ("detectron2", "fvcore", "pycocotools"),
    "extra: transformers, llava": ("transformers", "accelerate"),
    "extra: deepspeed, llava": ("deepspeed",),
    "extra: llava": ("jinja2", "sentencepiece", "open_clip_torch", "peft", "tensorboard"),
    "extra: llava-qlora": ("bitsandbytes",),
    "extra: web": ("gradio",),
    "extra: client": ("openai",),
    "extra: export": ("onnx", "onnxscript", "onnxruntime"),
    "extra: demo": ("scikit-image", "scikit-learn"),
}

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

# Everything that each use of PIIP-LLaVA needs
_CHAT = ("transformers", "jinja2")
_TRAINING = (*_CHAT, "accelerate", "peft")
LLAVA_NEEDS = {
    "chat model": _CHAT,
    "tokenizer.model files (Llama, Vicuna)": (*_CHAT, "sentencepiece"),
    "CLIP weights by name": (*_CHAT, "open_clip_torch"),
    "training, LoRA": _TRAINING,
    "deepspeed launcher, ZeRO": (*_TRAINING, "deepspeed"),
    "QLoRA": (*_TRAINING, "bitsandbytes"),
}
LLAVA_EXTRAS = ("llava", "llava-qlora", "transformers", "deepspeed")

ENVIRONMENT = ("CUDA_HOME", "FORCE_CUDA", "PIIP_DISABLE_EXTENSION", "PIIP_CPU_CAPABILITY", "OMP_NUM_THREADS")

DETECTRON2_HINT = (
    "Detectron2 is on no package index. With PyTorch and a C++ compiler installed: "
    "pip install --no-build-isolation -e '.[detection]' (needs access to github.com)"
)
LLAVA_HINT = "pip install --no-build-isolation -e '.[llava]', for QLoRA -e '.[llava-qlora]'"


def collect() -> dict[str, Any]:
    """Gathers the report as nested dictionaries of JSON types; starts compilers with --version, nothing else."""
    return {
        "system": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "cpu_count": os.cpu_count(),
        },
        "packages": {name: installed_version(name) for names in PACKAGES.values() for name in names},
        "untested": untested(),
        "torch": _torch_facts(),
        "build_tools": {
            "c++": _find_tool(os.environ.get("CXX", "c++")),
            "ninja": _find_tool("ninja"),
            "nvcc": _find_tool("nvcc", r"release [\d.]+, V[\d.]+"),
        },
        "environment": {name: os.environ.get(name, "not set") for name in ENVIRONMENT},
        "operator": _operator_facts(),
        "detectron2": _detectron2_facts(),
        "llava": _llava_facts(),
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
        "cuda_kernels": f"CUDA {major}.{minor // 10}" if major else none,
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


def _detectron2_facts() -> dict[str, Any]:
    version = installed_version("detectron2")
    if version is None:
        return {"found": False, "hint": DETECTRON2_HINT}
    origin = importlib.metadata.distribution("detectron2").read_text("direct_url.json")
    commit = json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None
    facts = {"found": True, "version": version, "commit": commit or "unknown"}
    setuptools = installed_version("setuptools")
    if setuptools and int(setuptools.split(".")[0]) >= 81:
        facts["hint"] = (
            f"detectron2.model_zoo needs setuptools below 81, found {setuptools}: pip install 'setuptools<81'"
        )
    return facts


def _llava_facts() -> dict[str, str]:
    """Which uses of PIIP-LLaVA are ready, and what the others lack."""
    wanted = _wanted_versions()
    facts = {}
    for use, packages in LLAVA_NEEDS.items():
        lacking = []
        for name in packages:
            requirement, version = wanted.get(name, Requirement(name)), installed_version(name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                lacking.append(f"{name}{requirement.specifier} ({version or 'not installed'})")
        facts[use] = f"needs {', '.join(lacking)}" if lacking else "ready"
    if set(facts.values()) != {"ready"}:
        facts["hint"] = LLAVA_HINT
    return facts


def _wanted_versions() -> dict[str, Requirement]:
    """What this project's own metadata asks of the packages for PIIP-LLaVA; empty where it is not installed."""
    try:
        lines = importlib.metadata.requires("piip") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [Requirement(line) for line in lines]
    return {
        each.name: each
        for each in found
        if each.marker is not None and any(each.marker.evaluate({"extra": extra}) for extra in LLAVA_EXTRAS)
    }


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


def format_report(report: dict[str, Any]) -> str:
    """The report as indented text."""
    needed_for = {name: need for need, names in PACKAGES.items() for name in names}
    packages = {name: f"{found or 'not installed'}  ({needed_for[name]})" for name, found in report["packages"].items()}
    note = "; ".join(report["untested"]) or "all versions are among those tested"
    return "\n".join(_indent(report | {"packages": packages, "untested": {"NOTE": note}}))


def _indent(entries: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, entry in entries.items():
        if isinstance(entry, dict):
            yield f"{indent}{key}:"
            yield from _indent(entry, indent + "  ")
        else:
            text = ", ".join(map(str, entry)) or "none" if isinstance(entry, list) else entry
            yield f"{indent}{key}: {'not found' if text is None else text}"


def main() -> None:
    """Entry point of `python -m piip_core.doctor`."""
    parser = argparse.ArgumentParser(
        prog="python -m piip_core.doctor", description="Print what a bug report about PIIP needs."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    report = collect()
    print(json.dumps(report, indent=1) if args.json else format_report(report))


if __name__ == "__main__":
    main()
