"""Curves for experiment trackers: Weights & Biases and MLflow. TensorBoard's are Detectron2's."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf

from piip_core.errors import ConfigError, check_choice

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "wandb", "mlflow")
_RUN = "{}_run.txt"  # in the output folder: the run's id, to go on with it


def trackers(cfg: DictConfig) -> list[EventWriter]:
    """The writers that `train.track` asks for, beside TensorBoard's.

    Raises:
        ConfigError: If it is none of `TRACKERS`, or its package is not installed.
    """
    name = cfg.train.get("track", "tensorboard")
    check_choice("train.track", name, TRACKERS)
    return [] if name == "tensorboard" else [TrackingWriter(name, cfg)]


class TrackingWriter(EventWriter):
    """Sends all scalars to a run of W&B or MLflow, which are set up as always, by their environment variables.

    A training that is resumed goes on with its run, whose id is kept in the output folder.
    """

    def __init__(self, package: str, cfg: DictConfig) -> None:
        try:
            module = import_module(package)
        except ImportError:
            raise ConfigError(f'train.track={package}: needs that package: pip install "piip[{package}]"') from None
        folder = Path(cfg.train.output_dir)
        note = folder / _RUN.format(package)
        known = note.read_text() if note.is_file() else None
        start = _start_wandb if package == "wandb" else _start_mlflow
        try:
            run, self._log, self.close = start(module, folder, known, OmegaConf.to_container(cfg.train))
        except Exception as error:  # each package has its own: no server, no account
            raise ConfigError(f"train.track={package}: cannot be started: {error}") from error
        note.write_text(run)
        self._last_write = -1

    def write(self) -> None:
        """Sends what is new, by iteration."""
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(20).items():
            if iteration > self._last_write:
                new[iteration][name] = value
        for iteration in sorted(new):
            self._last_write = iteration
            try:
                self._log(new[iteration], step=iteration)
            except Exception as error:  # of a server, over which no training shall end
                logger.warning("Curves of iteration %d could not be sent: %s", iteration, error)


Started = tuple[str, Callable[..., Any], Callable[[], Any]]
"""Id of a run, what takes scalars and step, and what ends it."""


def _start_wandb(wandb: Any, folder: Path, known: str | None, settings: Mapping[str, Any]) -> Started:
    project = os.environ.get("WANDB_PROJECT", "piip")
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=settings, id=known, resume="allow")
    return run.id, run.log, run.finish


def _start_mlflow(mlflow: Any, folder: Path, known: str | None, settings: Mapping[str, Any]) -> Started:
    run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
    if known is None:
        mlflow.log_params(settings)

    def log(scalars: Mapping[str, float], step: int) -> None:
        mlflow.log_metrics({re.sub(r"[^\w/.\- :]", "_", name): value for name, value in scalars.items()}, step=step)

    return run.info.run_id, log, mlflow.end_run
