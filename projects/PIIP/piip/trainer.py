"""Mixed-precision training on any device, and the hooks of the training tool that Detectron2 does not have."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import AMPTrainer, HookBase
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter

from piip.data.loader import derive_seed
from piip_core.training_checkpoints import FailedSaves, SaveError

__all__ = [
    "ClipNorm",
    "MixedPrecisionTrainer",
    "Saves",
    "StepSeed",
    "TerminalProgress",
    "UnhinderedWriter",
    "timed_batches",
]

logger = logging.getLogger(__name__)

_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def timed_batches(loader: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Batches of a loader, from the first request on, and the seconds that each one was waited for."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        yield next(batches), time.perf_counter() - start


class MixedPrecisionTrainer(AMPTrainer):
    """`AMPTrainer` for CPU too, and without loss scaling in bfloat16, which has the range of float32.

    Args:
        model (nn.Module): returns a dict of losses.
        data_loader (Iterable): batches for the model.
        optimizer (torch.optim.Optimizer): over the model's parameters.
        device (torch.device): where the model is.
        precision (str): "bfloat16" or "float16"; the latter on CUDA only.
    """

    def __init__(self, model: Any, data_loader: Any, optimizer: Any, *, device: torch.device, precision: str) -> None:
        if precision not in _PRECISIONS:
            raise ValueError(f"train.amp.precision={precision!r}: expected one of {sorted(_PRECISIONS)}")
        if precision == "float16" and device.type != "cuda":
            raise ValueError(f"train.amp.precision='float16' on {device}: expected CUDA; use 'bfloat16'")
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        super().__init__(model, data_loader, optimizer, grad_scaler=scaler, precision=_PRECISIONS[precision])
        self._device_type = device.type
        self._batches = timed_batches(data_loader)

    def run_step(self) -> None:
        """One iteration: forward under autocast, scaled backward, optimizer step."""
        data, data_time = next(self._batches)
        with torch.autocast(self._device_type, dtype=self.precision):
            losses = self.model(data)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()
        self.write_metrics(losses, data_time, self.iter)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores iteration, hooks, optimizer and, where the checkpoint has one, the gradient scaler."""
        # A run may go on in mixed precision that began without it.
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict(), **state_dict})


class ClipNorm(HookBase):
    """Scales the gradients down if their norm, over all parameters together, is larger than a limit.

    Args:
        limit (float): largest norm.
    """

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

    Args:
        saves (HookBase): raises `SaveError` in `after_step` on all processes on which it runs, or on none.
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
        """Says what was not written.

        Raises:
            SaveError: If that goes for what the last iteration should have saved.
        """
        self._failed.report()
        if self._last:
            raise self._last


class UnhinderedWriter(EventWriter):
    """A writer of metrics at whose failures, of a full disk say, the training goes on.

    Args:
        writer (EventWriter): what cannot be written is kept by its buffers, where it has some.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer, self._failed = writer, 0

    def write(self) -> None:
        """Writes the metrics; of failures only the first is logged."""
        try:
            self._writer.write()
        except OSError as error:
            self._failed += 1
            if self._failed == 1:
                logger.error("Metrics could not be written (%s): training goes on without", error)

    def close(self) -> None:
        """Closes the writer; a failure is logged."""
        try:
            self._writer.close()
        except OSError as error:
            logger.error("Metrics could not be written (%s)", error)


class StepSeed(HookBase):
    """Seeds all generators before every iteration, so that an iteration is the same in a resumed run.

    Args:
        seed (int): same on all processes; negative draws one, which checkpoints keep.
    """

    def __init__(self, seed: int) -> None:
        self._drawn = seed < 0
        self.seed = comm.shared_random_seed() if self._drawn else seed

    def before_step(self) -> None:
        """Seeds Python, NumPy and PyTorch from the seed, the process and the iteration."""
        seed = derive_seed(self.seed, comm.get_rank(), self.trainer.iter)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def state_dict(self) -> dict[str, int]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes over a checkpoint's seed if this run's was drawn."""
        if self._drawn:
            self.seed = state["seed"]


class TerminalProgress(HookBase):
    """Prints losses, rate and time left every `period` iterations, and after `seconds` without a line.

    Args:
        max_iter (int): last iteration, for the time left.
        period (int): iterations between lines.
        seconds (float): longest silence while iterations pass.
    """

    def __init__(self, max_iter: int, period: int = 20, seconds: float = 10.0) -> None:
        self._printer = CommonMetricPrinter(max_iter)
        self._period, self._seconds = period, seconds
        self._last = time.monotonic()

    def after_step(self) -> None:
        """Prints a line if the period, the training or the longest silence is over."""
        due = (self.trainer.iter + 1) % self._period == 0 or self.trainer.iter == self.trainer.max_iter - 1
        if due or time.monotonic() - self._last > self._seconds:
            self._last = time.monotonic()
            self._printer.write()

    def after_train(self) -> None:
        """Prints what is left and closes the printer."""
        self._printer.write()  # what other hooks put there after the last iteration
        self._printer.close()
