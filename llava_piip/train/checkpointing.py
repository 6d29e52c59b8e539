"""Folders of a run: published whole, found again, and never half of one taken for a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from piip_core.errors import UserError
from piip_core.files import flush, rename_durably

__all__ = [
    "FINAL",
    "STAGING",
    "OutputFolderError",
    "SaveError",
    "check_same_processes",
    "checkpoints_in",
    "discard",
    "keep_last",
    "prepare_output",
    "publish",
    "staging",
]

# Everything is written below this folder of a run; whatever lies in it at a start is what a killed run left behind
STAGING = ".incomplete"
# The trained model, beside the checkpoints
FINAL = "final"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_STATE = "trainer_state.json"


class SaveError(UserError):
    """Something could not be written; the message says what, why and what is still there."""


class OutputFolderError(UserError):
    """The folder of a run cannot be used as it is; the message names the fix."""


def checkpoints_in(run: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    run = Path(run)
    if not run.is_dir():
        return []
    found = [(int(match[1]), path) for path in run.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / _STATE).is_file()]


def prepare_output(
    run: str | os.PathLike[str],
    *,
    resume: bool = False,
    resume_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Path | None:
    """Makes sure that a run can write to its folder, and finds the checkpoint to go on from.

    All processes call it together; what a killed run left half written is removed.

    Args:
        run: Folder of the run.
        resume: Go on from the last checkpoint, if there is one.
        resume_from: Go on from this checkpoint.
        overwrite: Delete the checkpoints of an earlier run.
        writes: Whether this process writes to the folder.
        wait: Returns when all processes have called it.

    Returns:
        The checkpoint, or None for a start from the beginning.

    Raises:
        OutputFolderError: If the folder holds something and none of the three is asked for, or `resume_from` is no
            complete checkpoint.
    """
    run = Path(run)
    if run.exists() and not run.is_dir():
        raise OutputFolderError(f"output_dir {run}: is a file; expected a folder, which may not exist yet")
    content = sorted(path.name for path in run.iterdir() if path.name != STAGING) if run.is_dir() else []
    if content and not (resume or resume_from or overwrite):
        some = ", ".join(content[:4]) + (", ..." if len(content) > 4 else "")
        raise OutputFolderError(
            f"output_dir {run}: is not empty ({some}). Give --resume true to go on with the run in it, "
            "--overwrite_output_dir true to start it anew, or another --output_dir"
        )
    if resume_from is not None and not (Path(resume_from) / _STATE).is_file():
        complete = ", ".join(map(str, checkpoints_in(run))) or "none"
        raise OutputFolderError(
            f"resume_from_checkpoint {resume_from}: is no complete checkpoint, it has no {_STATE}. Complete ones in "
            f"{run}: {complete}"
        )
    wait()  # nobody deletes or makes anything before everybody has looked
    if writes:
        _make(run)
        if overwrite:
            for path in [*checkpoints_in(run), run / FINAL]:
                discard(path, run)
        shutil.rmtree(run / STAGING, ignore_errors=True)
    wait()
    if resume_from is not None:
        return Path(resume_from)
    return checkpoints_in(run)[-1] if resume and checkpoints_in(run) else None


@contextmanager
def staging(run: Path, name: str) -> Iterator[Path]:
    """Gives the folder to write `name` of a run to before it is published.

    Raises:
        SaveError: If the writing fails, on the process where it fails. What was published before stays.
    """
    folder = run / STAGING / name
    try:
        yield folder
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors hide the system's error
        raise SaveError(_describe(error, run, name)) from error


def publish(run: Path, name: str) -> Path:
    """Moves the complete folder `name` from the staging folder into the run, in one step.

    Raises:
        SaveError: If that fails; what was published before stays.
    """
    source, target = run / STAGING / name, run / name
    with staging(run, name):
        flush(source)
        discard(target, run)
        rename_durably(source, target)
        _tidy(run)
    return target


def discard(folder: Path, run: Path) -> None:
    """Deletes a folder of a run such that it is never seen with a part of its files."""
    if folder.exists():
        aside = run / STAGING / f"discarded-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        _tidy(run)


def keep_last(run: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints of a run beyond `limit`; never the last one, nor the best."""
    complete = checkpoints_in(run)
    for folder in complete[:-limit] if limit and limit > 0 else []:
        if best is None or folder != Path(best):
            discard(folder, run)


def check_same_processes(checkpoint: Path, num_processes: int) -> None:
    """Refuses a checkpoint of ZeRO partitions that were cut for another number of processes.

    Raises:
        OutputFolderError: If the numbers differ.
    """
    file = checkpoint / "training_arguments.json"
    written = json.loads(file.read_text()).get("num_processes", num_processes) if file.is_file() else num_processes
    if written != num_processes:
        raise OutputFolderError(
            f"{checkpoint}: is of a run with {written} processes, this one has {num_processes}, and DeepSpeed cuts its "
            f"checkpoints into one piece per process. Start {written} processes, or start anew from its weights: "
            f"--model {checkpoint}"
        )


def _tidy(run: Path) -> None:
    if not any((run / STAGING).iterdir()):
        (run / STAGING).rmdir()


def _make(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFolderError(
            f"output_dir {run}: cannot be made ({error.strerror}); give a folder you may write to"
        ) from None


def _describe(error: BaseException, run: Path, name: str) -> str:
    reason = " ".join(str(error).split())[:300]
    complete = checkpoints_in(run)
    last = f"The last complete checkpoint is {complete[-1]}" if complete else "There is no complete checkpoint yet"
    free = shutil.disk_usage(run).free
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "The disk is full: free" if full else "If the disk is full, free"
    return (
        f"{run / name}: could not be written ({reason}; {free / 1e9:.1f} GB are free). {last}. "
        f"{fix} some space (--save_total_limit keeps fewer checkpoints) and start again with --resume true"
    )
