"""Checkpoint folders of a training run: published whole, found again, and never half of one taken for a checkpoint."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from torch import distributed

from .errors import OutputFolderError, SaveError
from .files import LOCK_NAME, find_refusal, flush, lock_folder, rename_durably


def _gathered(value: str | None) -> list[str]:
    """What the processes of a run say, those that say anything."""
    values = [value]
    if distributed.is_initialized():
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return [text for text in values if text]


@contextmanager
def lock_run(path: str | os.PathLike[str], otherwise: str) -> Iterator[None]:
    """`lock_folder` for a training: all its processes call it together, and each gets the error of any."""
    message = None
    with ExitStack() as stack:
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            try:
                stack.enter_context(lock_folder(path, otherwise))
            except OutputFolderError as error:
                message = str(error)
        for text in _gathered(message):
            raise OutputFolderError(text)
        yield


class FailedSaves:
    """Checkpoints that could not be written while the training went on; said in the log of the given logger."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.messages: list[str] = []

    def add(self, error: SaveError) -> None:
        """Logs a failed save and counts it."""
        self.messages.append(str(error))
        self.logger.error("%s. Training goes on (%d failed so far)", error, len(self.messages))

    def report(self) -> None:
        """Says at the end how many there were."""
        if self.messages:
            self.logger.error(
                "%d saves failed during the training; the last: %s", len(self.messages), self.messages[-1]
            )


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with its checkpoints `checkpoint-N` of update N.

    Args:
        path: The folder; it need not exist.
        state_file: Name of a file that every complete checkpoint has.
        fewer: What the user sets to keep fewer checkpoints.
        resume: What the user sets to go on with the run.
    """

    # Everything is written below this folder; whatever lies in it at a start is what a killed run left behind
    STAGING: ClassVar[str] = ".incomplete"
    PREFIX: ClassVar[str] = "checkpoint-"

    path: Path
    state_file: str
    fewer: str
    resume: str

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        pattern = re.compile(rf"{self.PREFIX}(\d+)")
        found = [(int(match[1]), path) for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))]
        return [path for _, path in sorted(found) if self.is_complete(path)]

    def is_complete(self, checkpoint: str | os.PathLike[str]) -> bool:
        """Whether a folder is a complete checkpoint."""
        return (Path(checkpoint) / self.state_file).is_file()

    def content(self) -> list[str]:
        """Names of what is in the folder, but for what no run leaves behind for good."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(path.name for path in found if path.name not in (self.STAGING, LOCK_NAME))

    def clear_staging(self) -> None:
        """Deletes what a killed run left half written."""
        shutil.rmtree(self.path / self.STAGING, ignore_errors=True)

    def save(self, name: str, write: Callable[[Path], object], *, main: bool) -> Path:
        """Writes the folder `name` below the staging folder, then moves it into the run.

        All processes call it together.

        Args:
            name: Of the folder.
            write: Writes the share of this process into the folder that it is given.
            main: Whether this process makes and moves the folder.

        Raises:
            SaveError: On all processes, if one of them could not write. What was published before stays.
        """
        staged = self.path / self.STAGING / name
        self._together(name, lambda: staged.mkdir(parents=True, exist_ok=True), runs=main, main=main)
        self._together(name, lambda: write(staged), main=main)
        self._together(name, lambda: self.publish(name), runs=main, main=main)
        return self.path / name

    def _together(self, name: str, action: Callable[[], object], *, main: bool, runs: bool = True) -> None:
        """A step of a save that is done when all processes have done it."""
        message = None
        try:
            if runs:
                action()
        except (torch.OutOfMemoryError, distributed.DistError):
            raise
        # torch.save and safetensors hide the system's error
        except (OSError, SafetensorError, RuntimeError, SaveError) as error:
            message = self._describe(error, name)
        failed = _gathered(message)
        if failed:
            if main:
                self.clear_staging()
            raise SaveError(failed[0])

    def publish(self, name: str) -> None:
        """Moves the complete folder `name` from the staging folder into the run, in one step."""
        source, target = self.path / self.STAGING / name, self.path / name
        flush(source)
        self.discard(target)
        rename_durably(source, target)
        self._tidy()

    def discard(self, folder: Path) -> None:
        """Deletes a folder of the run such that it is never seen with a part of its files."""
        if folder.exists():
            aside = self.path / self.STAGING / f"discarded-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            os.replace(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
            self._tidy()

    def keep_last(self, limit: int | None, best: str | os.PathLike[str] | None = None) -> None:
        """Deletes the oldest checkpoints beyond `limit` (None or 0: none); never the last one, nor the best."""
        complete = self.checkpoints()
        for folder in complete[:-limit] if limit and limit > 0 else []:
            if best is None or folder != Path(best):
                self.discard(folder)

    @staticmethod
    def check_same_processes(checkpoint: Path, written: int, num_processes: int, otherwise: str) -> None:
        """Raises OutputFolderError for a checkpoint of ZeRO partitions that another number of processes wrote.

        Args:
            checkpoint: Its folder.
            written: Number of processes that wrote it.
            num_processes: Number of processes now.
            otherwise: How to go on from its weights alone.
        """
        if written != num_processes:
            raise OutputFolderError(
                f"{checkpoint}: is of a run with {written} processes, this one has {num_processes}, and DeepSpeed cuts "
                f"its checkpoints into one piece per process. Start {written} processes, or start anew from its "
                f"weights: {otherwise}"
            )

    def _tidy(self) -> None:
        if not any((self.path / self.STAGING).iterdir()):
            (self.path / self.STAGING).rmdir()

    def _describe(self, error: BaseException, name: str) -> str:
        found = find_refusal(error)
        reason = found[0] if found else " ".join(str(error).split())[:300]
        complete = self.checkpoints()
        last = f"The last complete checkpoint is {complete[-1]}" if complete else "There is no complete checkpoint yet"
        free = shutil.disk_usage(self.path).free
        fix = found[1] if found else "if the disk is full, free some space"
        return (
            f"{self.path / name}: could not be written ({reason}; {free / 1e9:.1f} GB are free). {last}. To mend it: "
            f"{fix}; {self.fewer} keeps fewer checkpoints; {self.resume} goes on with the run"
        )
