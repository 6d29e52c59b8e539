"""Keeps transformers from taking a folder for a package."""

import importlib.util
import sys

from transformers.utils import is_datasets_available

__all__ = ["hide_datasets_folder"]


def hide_datasets_folder() -> None:
    """Hides a folder `datasets/` of the working directory, such as a checkout's, that no package of that name hides.

    transformers' Trainer takes it for Hugging Face's package, and keeps its answer in a cache, which is not documented.
    Seen working with transformers 5.16 to 5.24.
    """
    spec = importlib.util.find_spec("datasets") if is_datasets_available() else None
    if spec is not None and spec.origin is None:
        sys.modules["datasets"] = None
        is_datasets_available.cache_clear()
