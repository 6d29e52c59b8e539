"""Finding the files of a data set in its folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from .dataset import DatasetError, first_few

__all__ = ["find_files", "leads_up", "named_endings", "warn_left_out"]

logger = logging.getLogger(__name__)

_warn_once = cache(logger.warning)  # folders are listed several times


def find_files(folder: str, endings: Collection[str]) -> tuple[list[str], list[str]]:
    """Looks for files in a folder and those below it, in the order of their folders and names.

    Hidden files and folders are left out. Links to folders are followed, but not where they lead back up.

    Returns:
        Paths of the files with one of the `endings` (lower case, with the dot; in files also upper case), and of the
        others.

    Raises:
        DatasetError: If a folder cannot be listed.
    """
    found, others = [], []
    for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and not leads_up(os.path.join(root, name))]
        for name in names:
            if name[0] != ".":
                known = os.path.splitext(name)[1].lower() in endings
                (found if known else others).append(os.path.join(root, name))
    return sorted(found, key=os.path.split), sorted(others, key=os.path.split)


def _refuse(error: OSError) -> None:
    raise DatasetError(f"{error.filename}: cannot be listed ({error.strerror}): expected a readable folder") from error


def leads_up(folder: str) -> bool:
    """Whether a folder is a link to one that it lies in; if so, a warning says it."""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder).rstrip(os.sep) + os.sep
    up = any(f"{os.path.realpath(above)}{os.sep}".startswith(target) for above in Path(os.path.abspath(folder)).parents)
    if up:
        _warn_once("%s: is a link to a folder that it lies in, and is not followed", folder)
    return up


def named_endings(endings: Sequence[str]) -> str:
    """Endings in words."""
    return endings[0] if len(endings) == 1 else ".jpg, .png or another ending of images that Pillow reads"


def warn_left_out(folder: str, what: str, paths: Sequence[str]) -> None:
    """Says how many files are left out, by their endings, and names the first."""
    if paths:
        endings = Counter(os.path.splitext(path)[1] or "without ending" for path in paths).most_common()
        counts = ", ".join(f"{count} {ending}" for ending, count in endings)
        shown = first_few(paths)
        logger.warning(
            "%s: %d files do not end as %s and are left out (%s): %s", folder, len(paths), what, counts, shown
        )
