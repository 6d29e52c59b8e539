"""Detectron2's checkpointer with atomic writes, safe loading and, on request, strict loading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from piip.data import Category, DatasetError
from piip_core.checkpoints import find_pyramid, load_pyramid, pyramid_prefix, read_checkpoint
from piip_core.checkpoints.files import load_torch_file
from piip_core.checkpoints.single import listed
from piip_core.errors import CheckpointError
from piip_core.files import write_atomically

__all__ = ["RUN_STATE", "AtomicCheckpointer", "CategoryTable", "read_categories"]

# One file, and the index of several, as `write_checkpoint` makes them
_SAFETENSORS = (".safetensors", ".safetensors.index.json")
# In the checkpoint folders of runs under DeepSpeed: iteration, hooks, classes
RUN_STATE = "run_state.pth"


class CategoryTable:
    """The classes of a run, kept in its checkpoints: resuming checks them, `Predictor` takes names and ids from them.

    Args:
        categories: Class k of the model is entry k.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)

    def state_dict(self) -> list[dict[str, Any]]:
        return [{"id": category.id, "name": category.name} for category in self.categories]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Compares with a checkpoint.

        Raises:
            DatasetError: If the checkpoint was trained on other classes.
        """
        if state != self.state_dict():
            raise DatasetError(
                f"the checkpoint was trained on {len(state)} classes ({_names(state)}), the data set has "
                f"{len(self.categories)} ({_names(self.state_dict())}): to train on other classes, start anew with "
                "train.init_checkpoint=PATH instead of --resume"
            )


def _names(state: list[dict[str, Any]]) -> str:
    return ", ".join(entry["name"] for entry in state[:5]) + (" ..." if len(state) > 5 else "")


def read_categories(path: str) -> tuple[Category, ...]:
    """Classes stored in a checkpoint, without reading its tensors; nothing if it has none.

    Raises:
        CheckpointError: If the file cannot be loaded.
    """
    if path.endswith(_SAFETENSORS):
        state = read_checkpoint(path).description or {}
    else:
        file = os.path.join(path, RUN_STATE) if os.path.isdir(path) else path
        state = load_torch_file(PathManager.get_local_path(file))
    return tuple(Category(entry["id"], entry["name"]) for entry in state.get("categories", ()))


class AtomicCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that a crash while saving cannot hurt, and that loads tensors only, never code.

    Args:
        model (nn.Module): the model.
        save_dir (str): folder of the checkpoints.
        strict (bool): whether weights that are missing or of another shape are an error instead of a warning.
        checkpointables: as in `DetectionCheckpointer`.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, strict: bool = False, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes `<save_dir>/<name>.pth` and then points `last_checkpoint` to it; each appears whole or not at all."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, item.state_dict()) for key, item in self.checkpointables.items())
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with write_atomically(path) as file:
            torch.save(data, file)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a `.pth`, a `.safetensors`, its index (`.safetensors.index.json`), or a `checkpoint-N` of DeepSpeed.

        See fvcore's `Checkpointer.load`. If the file is that of another kind of model with a PIIP inside, such as a
        classifier's for a detector, and loading is not strict, the pyramid alone is loaded: see `load_pyramid`.

        Raises:
            CheckpointError: If the file is missing or unreadable or, when strict, does not fit the model.
        """
        try:
            if os.path.isdir(path):
                path = os.path.join(path, RUN_STATE)  # fvcore expects a file
            if path and "://" not in path and not os.path.isfile(path):
                raise CheckpointError(f"{path}: no such checkpoint (looked from {os.getcwd()})")
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set when loading fails

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        held, prefix = find_pyramid(self.model), pyramid_prefix(checkpoint["model"])
        if self.strict or held is None or prefix in (None, held[0]):
            return super()._load_model(checkpoint)
        source = self._parsed_url_during_load.geturl()
        report = load_pyramid(held[1], checkpoint.pop("model"), source=source)
        others = [name for name in self.model.state_dict() if not name.startswith(held[0])]
        self.logger.info(
            "The pyramid alone, from another kind of model; %d other tensors of this one stay as they were (%s). %s",
            len(others),
            listed(others),
            report.summary(),
        )
        return None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(_SAFETENSORS):
            return {"model": dict(read_checkpoint(filename).state)}
        if os.path.basename(filename) == RUN_STATE:
            return {"model": dict(read_checkpoint(os.path.dirname(filename)).state)}
        if not filename.endswith(".pth"):
            raise CheckpointError(f"{filename}: expected a .pth or .safetensors file (pickled formats can run code)")
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict[str, Any]:
        # Not mapped: on the CPU, the optimizer goes on with the tensors it is given
        return load_torch_file(f, mmap=False)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        problems = [f"{k} is {a} in the file, {b} in the model" for k, a, b in incompatible.incorrect_shapes]
        problems += [f"{key} is not in the file" for key in incompatible.missing_keys]
        if self.strict and problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"the checkpoint does not fit the model: {'; '.join(problems[:5])}{more}. Expected the configuration "
                "and the number of classes that it was trained with"
            )
        super()._log_incompatible_keys(incompatible)
