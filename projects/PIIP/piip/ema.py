"""A moving average of the weights during training: timm's, kept in checkpoints, evaluated and exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from piip.deepspeed_trainer import zero_stage
from piip_core.checkpoints import write_checkpoint
from piip_core.errors import ConfigError

__all__ = ["FINAL_AVERAGE", "WeightAverage", "average_settings"]

FINAL_AVERAGE = "model_ema.safetensors"
"""What the average is called in the folder of a finished run."""


def average_settings(cfg: DictConfig) -> dict[str, Any] | None:
    """Arguments of timm's `ModelEmaV3` in `train.ema`, or None if its `decay` is null.

    Raises:
        ConfigError: If the decay is no rate, or the weights are divided among the processes.
    """
    settings = OmegaConf.to_container(OmegaConf.select(cfg, "train.ema", default=OmegaConf.create({"decay": None})))
    decay = settings["decay"]
    if decay is None:
        return None
    if not 0 <= decay < 1:
        raise ConfigError(f"train.ema.decay={decay}: expected a rate from 0 to below 1, or null for no average")
    if zero_stage(cfg) == 3:
        raise ConfigError(
            f"train.ema.decay={decay}: expected null with train.deepspeed.stage=3, where no process holds all weights; "
            "stages 0 to 2 can average them"
        )
    return settings


class WeightAverage(HookBase):
    """Updates an average of the weights after every iteration; it is part of the trainer's state in checkpoints.

    The last one is written to the output folder, to be loaded like any weights.

    Args:
        model (nn.Module): the model as it was built: not wrapped, on its device.
        output_dir (str): folder of the run.
        description (Mapping[str, Any]): what to store beside the exported weights.
        settings: arguments of timm's `ModelEmaV3`, such as decay.
    """

    def __init__(
        self, model: nn.Module, output_dir: str, description: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
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
        # DistributedDataParallel and DeepSpeed's engine hold the model as `module`
        return getattr(self.trainer.model, "module", self.trainer.model)

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over the average of a checkpoint, which `start` then keeps."""
        self.model.load_state_dict(state)
        self._loaded = True
