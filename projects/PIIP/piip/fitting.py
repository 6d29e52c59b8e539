"""Trainings that fit: batches that pass the model in parts, and parts of the model that are not trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from piip.modeling.backbone import PIIPBackbone
from piip.precision import training_precision
from piip_core import PIIP
from piip_core.errors import ConfigError, check_choice

logger = logging.getLogger(__name__)


class MicroBatches(nn.Module):
    """Passes a batch through a model in parts, and their gradients back; the losses are means over the batch.

    Gradients are those of the whole batch where a loss is a mean over images, as that of classes is; losses that are
    means over what was found in a part weigh parts by their images. Where the memory of a GPU runs out, parts are
    halved and the batch is done again.

    Args:
        model: Takes a list of samples and gives a dict of losses; may be wrapped for several processes.
        size: Images at a time.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = model, size

    def forward(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Losses without a graph: gradients are added to the parameters already."""
        while True:
            try:
                losses = self._run(batch)
                # What the trainer does with them must not fail, and adds nothing
                return {name: loss.requires_grad_() for name, loss in losses.items()}
            except torch.OutOfMemoryError:
                if self.size == 1 or hasattr(self.module, "no_sync"):  # others would not know of it
                    raise
                half = self.size // 2
                self.size = max(half - half % 2, 1)  # even: mixup takes pairs
            self.module.zero_grad()
            torch.cuda.empty_cache()
            logger.warning("The memory of the GPU ran out: from now on %d image(s) at a time", self.size)

    def _run(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for start in range(0, len(batch), self.size):
            part = batch[start : start + self.size]
            last = start + self.size >= len(batch)
            with nullcontext() if last or not hasattr(self.module, "no_sync") else self.module.no_sync():
                losses = {name: loss * (len(part) / len(batch)) for name, loss in self.module(part).items()}
                sum(losses.values()).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach()
        return total


def in_parts(model: nn.Module, cfg: DictConfig) -> nn.Module:
    """The model as `train.micro_batch` has it: as it is for null, or taking so many images at a time.

    Raises:
        ConfigError: If it is no positive number, or losses are scaled.
    """
    size = cfg.train.get("micro_batch")
    if size is None:
        return model
    if size < 1:
        raise ConfigError(f"train.micro_batch={size}: expected at least 1, or null for the whole batch")
    if training_precision(cfg) is torch.float16:
        raise ConfigError(f"train.micro_batch={size}: expected null with train.amp.precision=float16")
    return MicroBatches(model, size)


def freeze(model: nn.Module, what: str | None) -> None:
    """Leaves parts out of the training, as `train.freeze` has it.

    Args:
        model: Detector, segmentor or classifier.
        what: "branches", as `BranchConfig.frozen` of all of them; "all-but-heads" (and interactions, merging and
            pyramid of maps); or None for nothing.
    """
    if what is None:
        return
    check_choice("train.freeze", what, ("branches", "all-but-heads"))
    pyramids = [module for module in model.modules() if isinstance(module, PIIP)]
    for branch in (branch for pyramid in pyramids for branch in pyramid.branches):
        branch.freeze()
    if what == "all-but-heads":
        for module in [module for module in model.modules() if isinstance(module, PIIPBackbone)] or pyramids:
            module.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "train.freeze=%s: %.1f M of %.1f M parameters are trained",
        what,
        trained / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
