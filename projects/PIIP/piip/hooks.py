"""Hooks of the training tool that Detectron2 does not have."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from piip.data.loader import derive_seed
from piip.deepspeed_training import zero_stage
from piip_core.checkpoints import write_checkpoint
from piip_core.errors import ConfigError
from piip_core.files import read_json, write_atomically
from piip_core.training_checkpoints import FailedSaves, SaveError

logger = logging.getLogger(__name__)

FINAL_AVERAGE = "model_ema.safetensors"
"""What the average is called in the folder of a finished run."""
BEST, BEST_NOTE = "model_best.safetensors", "best.json"
"""What `BestModel` writes."""


class ClipNorm(HookBase):
    """Scales the gradients down if their norm, over all parameters together, is larger than `limit`."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def after_backward(self) -> None:
        """Clips the gradients, taking the loss scale off them first."""
        optimizer = self.trainer.optimizer
        scaler = getattr(self.trainer, "grad_scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.limit)


class Saves(HookBase):
    """Runs a hook that saves, at whose failures the training goes on; `check` at the end says whether the last failed.

    The hook raises `SaveError` in `after_step` on all processes on which it runs, or on none.
    """

    def __init__(self, saves: HookBase) -> None:
        self.saves, self._failed, self._last = saves, FailedSaves(logger), None

    def before_train(self) -> None:
        """Gives the hook the trainer, and its own `before_train`."""
        self.saves.trainer = self.trainer
        self.saves.before_train()

    def after_step(self) -> None:
        """Lets the hook save; logs and keeps a failure."""
        try:
            self.saves.after_step()
        except SaveError as error:
            self._failed.add(error)
            self._last = error if self.trainer.iter + 1 == self.trainer.max_iter else None

    def check(self) -> None:
        """Logs how many saves failed, and raises `SaveError` if that of the last iteration did."""
        self._failed.report()
        if self._last:
            raise self._last


class MetricWriters(hooks.PeriodicWriter):
    """Detectron2's hook of the writers, at whose failures, of a full disk say, the training goes on."""

    _failed = False

    def after_step(self) -> None:
        """Lets the writers write if it is time."""
        self._try(super().after_step)

    def after_train(self) -> None:
        """Writes what is left, and closes the writers."""
        self._try(super().after_train)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._failed:
                logger.error("Metrics could not be written (%s): training goes on without", error)
            self._failed = True


class StepSeed(HookBase):
    """Seeds all generators before every iteration, so that an iteration is the same in a resumed run.

    The seed is that of all processes; a negative one draws it, and checkpoints keep it.
    """

    def __init__(self, seed: int) -> None:
        self._drawn = seed < 0
        self.seed = comm.shared_random_seed() if self._drawn else seed

    def before_step(self) -> None:
        """Seeds Python, NumPy and PyTorch from the seed, the process and the iteration."""
        seed_all_rng(derive_seed(self.seed, comm.get_rank(), self.trainer.iter))

    def state_dict(self) -> dict[str, int]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes over a checkpoint's seed if this run's was drawn."""
        if self._drawn:
            self.seed = state["seed"]


def average_settings(cfg: DictConfig) -> dict[str, Any] | None:
    """Arguments of timm's `ModelEmaV3` in `train.ema`, or None if its `decay` is null.

    Raises:
        ConfigError: If the decay is no rate, or the weights are divided among the processes.
    """
    decay = OmegaConf.select(cfg, "train.ema.decay")
    if decay is None:
        return None
    if not 0 <= decay < 1:
        raise ConfigError(f"train.ema.decay={decay}: expected a rate from 0 to below 1, or null for no average")
    if zero_stage(cfg) == 3:
        raise ConfigError(
            f"train.ema.decay={decay}: expected null with train.deepspeed.stage=3, where no process holds all weights; "
            "stages 0 to 2 can average them"
        )
    return OmegaConf.to_container(cfg.train.ema)


class WeightAverage(HookBase):
    """Updates an average of the weights after every iteration; it is part of the trainer's state in checkpoints.

    The last one is written to the output folder with a `description`, to be loaded like any weights. `model` is not
    wrapped and on its device; `settings` are arguments of timm's `ModelEmaV3`, such as decay.
    """

    def __init__(self, model: nn.Module, output_dir: str, description: Mapping[str, Any], **settings: Any) -> None:
        self._average = ModelEmaV3(model, **settings)
        self._path, self._description = Path(output_dir, FINAL_AVERAGE), description
        self._loaded = False

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights, to be evaluated."""
        return self._average.module

    def start(self) -> None:
        """Takes over the weights that training starts from, unless a checkpoint had an average."""
        if not self._loaded:
            self._average.set(self._trained())

    def after_step(self) -> None:
        """Updates the average; after the last iteration the main process writes it to the output folder."""
        done = self.trainer.iter + 1
        self._average.update(self._trained(), step=done)
        if done == self.trainer.max_iter and comm.is_main_process():
            write_checkpoint(self._path, self.model.state_dict(), description=self._description)

    def _trained(self) -> nn.Module:
        model = self.trainer.model
        while hasattr(model, "module"):  # DistributedDataParallel, DeepSpeed's engine and MicroBatches hold it so
            model = model.module
        return model

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over the average of a checkpoint, which `start` then keeps."""
        self.model.load_state_dict(state)
        self._loaded = True


class TrainingEnds(BaseException):
    """The training is over before its last iteration. No `Exception`, which Detectron2 would log as an error."""


class BestModel(HookBase):
    """Keeps the weights with the best metric, and ends the training when it has not risen for long.

    Follows the hook that evaluates. `best.json` in the output folder says metric, value and iteration, also for a run
    that is resumed. All processes run it.

    Args:
        model: What is evaluated, and kept.
        output_dir: Folder of `BEST` and `best.json`.
        description: Kept beside the weights.
        period: Iterations from one evaluation to the next.
        metric: As in metrics.json, for example "bbox/AP"; more is better.
        patience: Evaluations without a better value after which the training ends; None: never.
    """

    def __init__(
        self,
        model: nn.Module,
        output_dir: str,
        description: Mapping[str, Any],
        *,
        period: int,
        metric: str,
        patience: int | None = None,
    ) -> None:
        if patience is not None and patience < 1:
            raise ConfigError(f"train.best.patience={patience}: expected at least 1, or null")
        self._model, self._folder, self._description = model, Path(output_dir), description
        self._period, self._metric, self._patience = period, metric, patience
        self.value, self.iteration = -math.inf, 0

    def before_train(self) -> None:
        """Takes over what an earlier part of a run found."""
        file = self._folder / BEST_NOTE
        if self.trainer.start_iter and file.is_file():
            found = read_json(file, ConfigError)
            if found.get("metric") == self._metric:
                self.value, self.iteration = float(found["value"]), int(found["iteration"])
        self._end_if_done(self.trainer.start_iter)

    def after_step(self) -> None:
        """Looks at an evaluation, if there was one."""
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done < self.trainer.max_iter:
            self._look(done)
            self._end_if_done(done)

    def after_train(self) -> None:
        """Looks at the last evaluation."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._look(self.trainer.max_iter)

    def _look(self, done: int) -> None:
        value, _ = self.trainer.storage.latest().get(self._metric, (math.nan, 0))
        if not value > self.value or not comm.is_main_process():  # others have no metrics
            return
        self.value, self.iteration = float(value), done
        try:
            write_checkpoint(self._folder / BEST, self._model.state_dict(), description=self._description)
            with write_atomically(self._folder / BEST_NOTE, "w") as file:
                json.dump({"metric": self._metric, "value": self.value, "iteration": done}, file)
        except SaveError as error:
            logger.error("%s. Training goes on", error)
            return
        logger.info("Best %s so far, %.2f, after %d iterations: %s", self._metric, self.value, done, BEST)

    def _end_if_done(self, done: int) -> None:
        waited = self._patience is not None and done - self.iteration >= self._patience * max(self._period, 1)
        if done and any(comm.all_gather(waited and comm.is_main_process())):
            logger.info("%s has not risen since iteration %d: the training ends", self._metric, self.iteration)
            raise TrainingEnds
