"""Detectron2's checkpointer with atomic writes, safe loading and, on request, strict loading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from piip.data import Category, DatasetError
from piip.lazy import lazy_dataclass
from piip.lazy_config import data_kind
from piip_core import zoo
from piip_core.checkpoints import (
    PublishedNames,
    find_checkpoint,
    find_pyramid,
    load_pyramid,
    load_torch_file,
    pyramid_prefix,
    read_checkpoint,
)
from piip_core.config import ClassifierConfig, PIIPConfig
from piip_core.errors import CheckpointError, ConfigError, listed
from piip_core.files import write_atomically

# One file, and the index of several, as `write_checkpoint` makes them
_SAFETENSORS = (".safetensors", ".safetensors.index.json")
_DATA_PARALLEL = "module."  # before the names of a model that was wrapped when it was saved
# In the checkpoint folders of runs under DeepSpeed: iteration, hooks, classes
RUN_STATE = "run_state.pth"


class CategoryTable:
    """The classes of a run, kept in its checkpoints: resuming checks them, `Predictor` takes names and ids from them.

    Args:
        categories: Class k of the model is entry k; empty if unknown.
    """

    def __init__(self, categories: Sequence[Category] = ()) -> None:
        self.categories = tuple(categories)

    def state_dict(self) -> list[dict[str, Any]]:
        """Id and name of every class."""
        return [{"id": category.id, "name": category.name} for category in self.categories]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Compares with a checkpoint, if both know their classes.

        Raises:
            DatasetError: If the checkpoint was trained on other classes.
        """
        if state and self.categories and state != self.state_dict():
            names = [listed([entry["name"] for entry in table]) for table in (state, self.state_dict())]
            raise DatasetError(
                f"the checkpoint was trained on {len(state)} classes ({names[0]}), the data set has "
                f"{len(self.categories)} ({names[1]}): to train on other classes, start anew with "
                "train.init_checkpoint=PATH instead of --resume"
            )


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
        """Writes `<save_dir>/<name>.pth` and then points `last_checkpoint` to it; each appears whole or not at all.

        Raises:
            SaveError: If the system refuses to write; what was there before stays.
        """
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
        """Writes the name of the last checkpoint to `<save_dir>/last_checkpoint`, whole or not at all."""
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """Loads a `.pth`, a `.safetensors`, its index (`.safetensors.index.json`), or a `checkpoint-N` of DeepSpeed.

        If the file is that of another kind of model with a PIIP inside, such as a classifier's for a detector, and
        loading is not strict, the pyramid alone is loaded: see `load_pyramid`.

        Args:
            path: File, folder or address; an empty one loads nothing.
            checkpointables: Names of what to load beside the model; None for all.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: If the file is missing or unreadable or, when strict, does not fit the model.
        """
        if not path:
            self.logger.info("No checkpoint: the model keeps the weights that it has")
            return {}
        self.logger.info("Loading %s", path)
        content = _read(path)
        self._fill_model(content.pop("model"), path)
        for name in self.checkpointables if checkpointables is None else checkpointables:
            if name in content:
                self.checkpointables[name].load_state_dict(content.pop(name))
        return content

    def _fill_model(self, state: dict[str, Tensor], path: str) -> None:
        if all(name.startswith(_DATA_PARALLEL) for name in state):
            state = {name.removeprefix(_DATA_PARALLEL): tensor for name, tensor in state.items()}
        own = self.model.state_dict()
        held, prefix = find_pyramid(self.model), pyramid_prefix(state)
        if not self.strict and held is not None and prefix not in (None, held[0]):
            report = load_pyramid(held[1], state, source=path)
            others = [name for name in own if not name.startswith(held[0])]
            self.logger.info(
                "The pyramid alone, from another kind of model; %d other tensors of this one stay as they were (%s). "
                "%s",
                len(others),
                listed(others),
                report.summary(),
            )
            return
        shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in state.keys() & own.keys()}
        wrong = {name: pair for name, pair in sorted(shapes.items()) if pair[0] != pair[1]}
        result = self.model.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
        # Old checkpoints of Detectron2 lack the first two, which the configuration says, and have the last
        missing = set(result.missing_keys) - {"pixel_mean", "pixel_std"} - wrong.keys()
        unknown = [name for name in result.unexpected_keys if "anchor_generator.cell_anchors" not in name]
        problems = [f"{name} is {a} in the file, {b} in the model" for name, (a, b) in wrong.items()]
        problems += [f"{name} is not in the file" for name in own if name in missing]
        if any(".lora_" in name for name in unknown):
            raise CheckpointError(
                f"{path}: has LoRA adapters, and the model none: expected the configuration that it was trained with"
            )
        if self.strict and problems:
            raise CheckpointError(
                f"the checkpoint does not fit the model: {listed(problems, separator='; ')}. Expected the "
                "configuration and the number of classes that it was trained with"
            )
        for problem in problems:
            self.logger.warning("%s: %s; it stays as it was", path, problem)
        if unknown:
            self.logger.warning("%s: the model has no %s", path, ", ".join(unknown))


def find_weights(path: str) -> str:
    """`find_checkpoint` for settings: an empty one, and addresses, are what they are."""
    return path if not path or "://" in path else str(find_checkpoint(path))


def _read(path: str) -> dict[str, Any]:
    """The weights of any checkpoint under "model", and beside them what a `.pth` holds."""
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, RUN_STATE)):
        return {"model": dict(read_checkpoint(path).state)}
    file = PathManager.get_local_path(path) if "://" in path else path
    if not os.path.isfile(file):
        raise CheckpointError(f"{path}: no such checkpoint (looked from {os.getcwd()})")
    if file.endswith(_SAFETENSORS):
        return {"model": dict(read_checkpoint(file).state)}
    if not file.endswith(".pth"):
        raise CheckpointError(f"{path}: expected a .pth or .safetensors file (pickled formats can run code)")
    # Not mapped: on the CPU, the optimizer goes on with the tensors it is given
    content = load_torch_file(file, mmap=False)
    return content if "model" in content else {"model": content}


def follow_published(cfg: DictConfig, weights: str) -> None:
    """Sets the configuration of the model to what the checkpoint holds, if it is a published one that was converted.

    That is `model.config` of a classifier, and the last branch of four, see `zoo.tsbl_as_released`. Others are left
    alone; checkpoints of trainings do not describe the model and change nothing.

    Raises:
        CheckpointError: If the file cannot be read.
        ConfigError: If it is a classifier with other image sizes than that of `cfg`.
    """
    node = cfg.model if data_kind(cfg) == "class_folders" else OmegaConf.select(cfg, "model.backbone.bottom_up")
    if node is None or "config" not in node or not os.path.exists(weights):
        return
    given, description = instantiate(node.config), read_checkpoint(weights).description or {}
    held = PublishedNames.from_dict(description).config if "config" in description else None
    if isinstance(given, PIIPConfig) and isinstance(held, PIIPConfig) and len(given.branches) == 4:
        released = zoo.tsbl_as_released(given)
        if [branch.network for branch in held.branches] == [branch.network for branch in released.branches]:
            node.config = lazy_dataclass(released)
        return
    if not isinstance(given, ClassifierConfig) or not isinstance(held, ClassifierConfig):
        return
    sizes = [[branch.image_size for branch in config.pyramid.branches] for config in (held, given)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{weights}: a classifier with images of {sizes[0]} pixels, the configuration has one with {sizes[1]}: "
            "expected the same; give the --config-file of the checkpoint's model"
        )
    cfg.model.config = lazy_dataclass(held)
    cfg.model.config.num_classes = "${data.num_classes}"
    cfg.data.num_classes = held.num_classes
