"""DeepSpeed, imported where it is used: importing it takes seconds, and most runs do without."""

from __future__ import annotations

import os
from types import ModuleType

from .errors import ConfigError

__all__ = ["BUCKET_SIZE", "LIVE_PARAMETERS", "import_deepspeed"]

BUCKET_SIZE = 200_000_000
"""Elements of DeepSpeed's buckets where nothing else is said: what is sent at a time."""
LIVE_PARAMETERS = 1_000_000_000
"""The most parameters that stage 3 keeps gathered (`stage3_max_live_parameters`)."""


def import_deepspeed(device: str | None = None) -> ModuleType:
    """Imports DeepSpeed such that a start on the CPU compiles nothing.

    Args:
        device: "cpu" or "cuda", where the model will be; None leaves the choice to DeepSpeed (DS_ACCELERATOR, or what
            it finds).

    Raises:
        ConfigError: If it is not installed.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported ({error}): pip install --no-build-isolation -e '.[deepspeed]'"
        ) from None
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        # An operator for inference alone, which DeepSpeed would compile for a minute at the first start. Its table of
        # operators is not documented. Seen working with DeepSpeed 0.19.8
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
