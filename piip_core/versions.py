"""Which releases of the libraries this release was tested with."""

from __future__ import annotations

import importlib.metadata

from packaging.version import InvalidVersion, Version

__all__ = ["TESTED", "installed_version", "untested"]

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
        if found is None:
            continue
        try:
            version = Version(Version(found).public)  # 2.14.1+cu130 is 2.14.1
        except InvalidVersion:
            lines.append(f"{package} {found} has no version that compares with those tested ({oldest} to {newest})")
            continue
        if version > Version(newest):
            lines.append(f"{package} {found} is newer than anything this release was tested with (up to {newest})")
        elif version < Version(oldest):
            lines.append(f"{package} {found} is older than anything this release was tested with (from {oldest})")
    return lines
