"""Folders of a run: what may be in one at the start, and the checkpoint to go on from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from piip_core.errors import CheckpointError
from piip_core.files import read_json
from piip_core.training_checkpoints import OutputFolderError, RunFolder, SaveError

from ..loading import FINAL

__all__ = [
    "OutputFolderError",
    "RunFolder",
    "SaveError",
    "check_same_processes",
    "prepare_output",
    "run_folder",
]


def run_folder(run: str | os.PathLike[str]) -> RunFolder:
    """The folder of a run of transformers' Trainer."""
    return RunFolder(Path(run), "trainer_state.json", fewer="--save_total_limit", resume="--resume true")


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
    folder = run_folder(run)
    run = folder.path
    if run.exists() and not run.is_dir():
        raise OutputFolderError(f"output_dir {run}: is a file; expected a folder, which may not exist yet")
    content = folder.content()
    if content and not (resume or resume_from or overwrite):
        some = ", ".join(content[:4]) + (", ..." if len(content) > 4 else "")
        raise OutputFolderError(
            f"output_dir {run}: is not empty ({some}). Give --resume true to go on with the run in it, "
            "--overwrite_output_dir true to start it anew, or another --output_dir"
        )
    if resume_from is not None and not folder.is_complete(resume_from):
        complete = ", ".join(map(str, folder.checkpoints())) or "none"
        raise OutputFolderError(
            f"resume_from_checkpoint {resume_from}: is no complete checkpoint, it has no {folder.state_file}. Complete "
            f"ones in {run}: {complete}"
        )
    wait()  # nobody deletes or makes anything before everybody has looked
    if writes:
        if overwrite:
            for path in [*folder.checkpoints(), run / FINAL]:
                folder.discard(path)
        folder.clear_staging()
    wait()
    if resume_from is not None:
        return Path(resume_from)
    return folder.checkpoints()[-1] if resume and folder.checkpoints() else None


def check_same_processes(checkpoint: Path, num_processes: int) -> None:
    """Refuses a checkpoint of ZeRO partitions that were cut for another number of processes.

    Raises:
        OutputFolderError: If the numbers differ.
    """
    file = checkpoint / "training_arguments.json"
    written = read_json(file, CheckpointError).get("num_processes", num_processes) if file.is_file() else num_processes
    RunFolder.check_same_processes(checkpoint, written, num_processes, f"--model {checkpoint}")
