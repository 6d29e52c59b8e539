"""Data sets that are written once, and again only when they would come out different."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from piip_core.files import publish_folder

__all__ = ["write_data_folder"]

_MANIFEST = "manifest.json"


def write_data_folder(root: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> bool:
    """Writes a data set with a manifest of its settings, unless it is there already.

    It is built under another name and renamed when complete; one made with other settings is replaced.

    Args:
        root: Folder of the data set.
        settings: Everything that its content depends on, ready for JSON.
        write: Writes the content into an empty folder.

    Returns:
        True if it was written, False if it was there.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    found = root / _MANIFEST
    manifest = json.dumps(settings, indent=1) + "\n"
    if root.exists() and not (found.is_file() and json.loads(found.read_text()).keys() == settings.keys()):
        raise FileExistsError(
            f"{root} exists and is not a digit data set of this kind: move it away or choose another folder"
        )
    if found.is_file() and found.read_text() == manifest:
        return False
    with publish_folder(root, overwrite=True, durable=False) as aside:
        write(aside)
        (aside / _MANIFEST).write_text(manifest)
    return True
