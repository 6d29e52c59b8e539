"""DeepSpeed, imported where it is used: importing it takes seconds, and most runs do without."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import ConfigError
from .files import write_atomically

BUCKET_SIZE = 200_000_000
"""Elements of DeepSpeed's buckets where nothing else is said: what is sent at a time."""
LIVE_PARAMETERS = 1_000_000_000
"""The most parameters that stage 3 keeps gathered (`stage3_max_live_parameters`)."""


def import_deepspeed(device: str | None = None) -> ModuleType:
    """Imports DeepSpeed such that a start on the CPU compiles nothing; raises ConfigError if it is not installed.

    The model will be on `device`, "cpu" or "cuda"; None leaves the choice to DeepSpeed (DS_ACCELERATOR, what it finds).
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


def save_engine(engine: Any, folder: str | os.PathLike[str], tag: str | None = None, **options: Any) -> None:
    """`engine.save_checkpoint`; all processes call it together, and get to its end also if one of them cannot write.

    DeepSpeed's processes wait for one another after writing, and in stage 3 gather weights again: one that left with an
    error before would stop the others for good.

    Args:
        engine: DeepSpeed's.
        folder: Where to.
        tag: Name of the folder in it; None for that of the update, as DeepSpeed has it.
        **options: For `engine.save_checkpoint`.

    Raises:
        OSError, RuntimeError: On the process that could not write.
    """
    errors: list[Exception] = []

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return call

    tag = tag or f"global_step{engine.global_steps}"
    # What writes in it: nothing promises the names. Seen working with DeepSpeed 0.19.8
    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    for owner, name in writers:
        setattr(owner, name, recorded(getattr(owner, name)))
    try:
        type(engine).save_checkpoint(engine, str(folder), tag=tag, save_latest=False, **options)
    finally:
        for owner, name in writers:
            delattr(owner, name)
    if errors:
        raise errors[0]
    if engine.global_rank == 0:
        with write_atomically(Path(folder) / "latest", "w") as file:
            file.write(tag)
