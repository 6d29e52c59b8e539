"""Checkpoints of runs under DeepSpeed, and the model as one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from piip.checkpointer import RUN_STATE, CategoryTable, read_categories
from piip_core.checkpoints import load_torch_file, read_checkpoint, write_checkpoint
from piip_core.deepspeed_start import save_engine
from piip_core.errors import CheckpointError, SaveError
from piip_core.files import write_atomically
from piip_core.training_checkpoints import OutputFolderError, RunFolder

# Folder of DeepSpeed's files in a checkpoint
_TAG = "zero"
_FINAL = "model_final.safetensors"


def run_folder(output_dir: str) -> RunFolder:
    """The folder of a run under DeepSpeed."""
    return RunFolder(Path(output_dir), RUN_STATE, fewer="train.checkpointer.max_to_keep", resume="--resume")


def export_checkpoint(checkpoint: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Writes the weights of a `checkpoint-N`, and the classes, as one file; see `write_checkpoint`.

    Returns:
        What to load: `target`, or its index.

    Raises:
        CheckpointError: If the folder is no complete checkpoint.
    """
    if not (Path(checkpoint) / RUN_STATE).is_file():
        found = f"has no {RUN_STATE}" if Path(checkpoint).is_dir() else "no such folder"
        raise CheckpointError(f"{checkpoint}: {found}; expected the checkpoint-N of a run under DeepSpeed")
    description = {"categories": CategoryTable(read_categories(str(checkpoint))).state_dict()}
    return write_checkpoint(target, read_checkpoint(checkpoint).state, description=description)


class DeepSpeedCheckpointer(HookBase):
    """Saves and loads `checkpoint-N`, the state after N iterations; all processes call the methods together.

    Such a folder holds DeepSpeed's files, one or two per process, and the state of trainer and hooks. It is written
    aside and renamed when the last process has written its share. As a hook, it saves every `period` iterations and at
    the end, where it exports the model too.

    Args:
        engine (deepspeed.DeepSpeedEngine): with model and optimizer.
        trainer (TrainerBase): its iteration and hooks are kept.
        output_dir (str): folder of the run.
        categories (CategoryTable): kept too.
        period (int): iterations between saves.
        max_to_keep (int): checkpoints to keep; None keeps all.
    """

    def __init__(
        self,
        engine: Any,
        trainer: Any,
        output_dir: str,
        categories: CategoryTable,
        *,
        period: int = 1,
        max_to_keep: int | None = None,
    ) -> None:
        self.engine, self.trainer, self.categories = engine, trainer, categories
        self.period, self.max_to_keep = period, max_to_keep
        self.run = run_folder(output_dir)

    def after_step(self) -> None:
        """Saves if the period or the training is over, and deletes the oldest checkpoints beyond `max_to_keep`.

        Raises:
            SaveError: If it cannot be written.
        """
        iterations, last = self.trainer.iter + 1, self.trainer.max_iter
        if iterations % self.period and iterations != last:
            return
        folder = self.run.save(f"{self.run.PREFIX}{iterations}", self._write, main=comm.is_main_process())
        if comm.is_main_process():
            self.run.keep_last(self.max_to_keep)
        comm.synchronize()
        if iterations == last:
            self.export(folder)

    def _write(self, folder: Path) -> None:
        save_engine(self.engine, folder, _TAG)
        state = {
            "trainer": self.trainer.state_dict(),
            "categories": self.categories.state_dict(),
            "stage": int(self.engine.zero_optimization_stage()),
            "num_processes": comm.get_world_size(),
        }
        if comm.is_main_process():
            with write_atomically(folder / RUN_STATE) as file:
                torch.save(state, file)

    def load(self, folder: Path) -> None:
        """Goes on from a complete checkpoint.

        Raises:
            OutputFolderError: If it is of another stage or number of processes.
            DatasetError: If it was trained on other classes.
        """
        state = load_torch_file(folder / RUN_STATE, mmap=False)
        self._check(folder, state)
        self.categories.load_state_dict(state["categories"])
        self.engine.load_checkpoint(str(folder), tag=_TAG)
        self.trainer.load_state_dict(state["trainer"])

    def export(self, checkpoint: Path) -> Path:
        """`export_checkpoint` to `model_final.safetensors` by the first process; all get its SaveError."""
        path = self.run.path / _FINAL
        if comm.is_main_process():
            try:
                path = export_checkpoint(checkpoint, path)
            except SaveError as error:
                path = error
        path = comm.all_gather(path)[0]
        if isinstance(path, SaveError):
            raise path
        return path

    def _check(self, folder: Path, state: dict[str, Any]) -> None:
        otherwise = f"train.init_checkpoint={folder}, another train.output_dir and no --resume"
        RunFolder.check_same_processes(folder, state["num_processes"], comm.get_world_size(), otherwise)
        stage = int(self.engine.zero_optimization_stage())
        if state["stage"] != stage:
            raise OutputFolderError(
                f"{folder}: is of ZeRO stage {state['stage']}, this run of {stage}. Go on with train.deepspeed.stage="
                f"{state['stage']}, or start anew from its weights: {otherwise}"
            )
