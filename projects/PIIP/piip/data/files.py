"""Finding the files of a data set in its folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache

from .errors import DatasetError, first_few

__all__ = ["find_files", "leads_up", "named_endings", "warn_left_out"]

logger = logging.getLogger(__name__)


def find_files(folder: str, endings: Collection[str], above: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Looks for files in a folder and those below it, in the order of their names.

    Hidden files and folders are left out. Links to folders are followed, but not where they lead back up.

    Args:
        folder: Where to look.
        endings: In lower case, with the dot; files may have them in upper case.
        above: Real paths of folders that no link leads back to, beside those on the way.

    Returns:
        Paths of the files with one of the endings, and of the others.

    Raises:
        DatasetError: If a folder cannot be listed.
    """
    found, others = [], []
    above = (*above, os.path.realpath(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be listed ({error.strerror}): expected a readable folder") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not _is_folder(entry):
            (found if os.path.splitext(entry.name)[1].lower() in endings else others).append(entry.path)
        elif not leads_up(entry.path, above):
            for files, more in zip((found, others), find_files(entry.path, endings, above), strict=True):
                files += more
    # Files of a folder before those of folders in it
    return sorted(found, key=os.path.split), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()  # asks the disk for links alone
    except OSError:  # a link to itself
        return False


def leads_up(folder: str, above: Sequence[str]) -> bool:
    """Whether a folder is a link to one of those above it, or to one that holds them; if so, a warning says it."""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder).rstrip(os.sep) + os.sep
    up = any(f"{place}{os.sep}".startswith(target) for place in above)
    if up:
        _warn_of_link(folder)
    return up


@cache  # folders are listed several times
def _warn_of_link(folder: str) -> None:
    logger.warning("%s: is a link to a folder that it lies in, and is not followed", folder)


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
