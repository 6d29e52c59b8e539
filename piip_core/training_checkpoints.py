"""Checkpoint folders of a training run: published whole, found again, and never half of one taken for a checkpoint."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError

from .errors import UserError
from .files import flush, rename_durably

__all__ = ["OutputFolderError", "RunFolder", "SaveError"]


class SaveError(UserError):
    """Something could not be written; the message says what, why and what is still there."""


class OutputFolderError(UserError):
    """The folder of a run cannot be used as it is; the message names the fix."""


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

    def clear_staging(self) -> None:
        """Deletes what a killed run left half written."""
        shutil.rmtree(self.path / self.STAGING, ignore_errors=True)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """Gives the folder to write `name` to before it is published.

        Raises:
            SaveError: If the writing fails, on the process where it fails. What was published before stays.
        """
        folder = self.path / self.STAGING / name
        try:
            yield folder
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors hide the system's error
            raise SaveError(self._describe(error, name)) from error

    def publish(self, name: str) -> Path:
        """Moves the complete folder `name` from the staging folder into the run, in one step.

        Raises:
            SaveError: If that fails; what was published before stays.
        """
        source, target = self.path / self.STAGING / name, self.path / name
        with self.staging(name):
            flush(source)
            self.discard(target)
            rename_durably(source, target)
            self._tidy()
        return target

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
        """Refuses a checkpoint of ZeRO partitions that were cut for another number of processes.

        Args:
            checkpoint: Its folder.
            written: Number of processes that wrote it.
            num_processes: Number of processes now.
            otherwise: How to go on from its weights alone.

        Raises:
            OutputFolderError: If the numbers differ.
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
        reason = " ".join(str(error).split())[:300]
        complete = self.checkpoints()
        last = f"The last complete checkpoint is {complete[-1]}" if complete else "There is no complete checkpoint yet"
        free = shutil.disk_usage(self.path).free
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "The disk is full: free" if full else "If the disk is full, free"
        return (
            f"{self.path / name}: could not be written ({reason}; {free / 1e9:.1f} GB are free). {last}. "
            f"{fix} some space ({self.fewer} keeps fewer checkpoints) and start again with {self.resume}"
        )
