"""Data sets that are written once, and again only when they would come out different."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from piip_core.errors import UserError
from piip_core.files import publish_folder

__all__ = ["write_data_folder"]


def write_data_folder(root: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> bool:
    """Writes a data set with a manifest of its settings, unless it is there already; returns whether it was written.

    It is built under another name and renamed when complete; one made with other settings is replaced.

    Args:
        root: Folder of the data set.
        settings: Everything that its content depends on, ready for JSON.
        write: Writes the content into an empty folder.

    Raises:
        UserError: If the folder holds something else.
    """
    found, manifest = root / "manifest.json", json.dumps(settings, indent=1) + "\n"
    try:
        old = json.loads(found.read_text())
    except (OSError, ValueError):
        old = None
    ours = isinstance(old, dict) and old.keys() == settings.keys()
    if root.is_dir() and any(root.iterdir()) and not ours:
        raise UserError(f"{root} exists and is not a digit data set of this kind: move it away or name another folder")
    if old == json.loads(manifest):
        return False
    with publish_folder(root, overwrite=True, durable=False) as aside:
        write(aside)
        (aside / found.name).write_text(manifest)
    return True
