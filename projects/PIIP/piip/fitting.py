"""Trainings that fit: batches that pass the model in parts, and models of which a part is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from piip.checkpointer import AtomicCheckpointer
from piip.modeling.backbone import PIIPBackbone
from piip.precision import training_precision
from piip_core import PIIP
from piip_core.errors import ConfigError, check, check_choice

logger = logging.getLogger(__name__)


class MicroBatches(nn.Module):
    """Passes a batch through a model in parts, and their gradients back; the losses are means over the batch.

    Gradients are those of the whole batch where a loss is a mean over images, as that of classes is; losses that are
    means over what was found in a part weigh parts by their images. On a GPU, two images of the first batch pass first,
    and the memory that they take says how many fit. Where it runs out nevertheless, parts are halved and the batch is
    done again.

    Args:
        model: Takes a list of samples and gives a dict of losses; may be wrapped for several processes.
        size: Images at a time, at most.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = model, size
        self._measured = size <= 2

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
        start = 0
        while start < len(batch):
            on_gpu = None if self._measured else self._memory()
            part = batch[start : start + (2 if on_gpu else self.size)]
            start += len(part)
            last = start == len(batch)
            with nullcontext() if last or not hasattr(self.module, "no_sync") else self.module.no_sync():
                losses = {name: loss * (len(part) / len(batch)) for name, loss in self.module(part).items()}
                sum(losses.values()).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach()
            if on_gpu:
                self._fit(on_gpu, len(part))
        return total

    def _memory(self) -> tuple[torch.device, int] | None:
        """The GPU, and the bytes in use before images pass; None on a CPU."""
        device = next(self.module.parameters()).device
        if device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(device)
        return device, torch.cuda.memory_allocated(device)

    def _fit(self, on_gpu: tuple[torch.device, int], images: int) -> None:
        """Lowers the size to what fits, a tenth of the memory left free."""
        device, before = on_gpu
        one = (torch.cuda.max_memory_allocated(device) - before) / images
        used = torch.cuda.memory_allocated(device)  # with the gradients; AdamW will add twice as much as they take
        moments = 2 * sum(p.nbytes for p in self.module.parameters() if p.requires_grad)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
        fitting = max(int((0.9 * free - moments) / one), 1)
        self._measured = True
        if fitting < self.size:
            self.size = max(fitting - fitting % 2, 1)
            logger.info("%.1f GiB an image: %d image(s) at a time", one / 2**30, self.size)


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


def add_adapters(model: nn.Module, rank: int | None) -> list[Any]:
    """Puts LoRA adapters on the linear layers of the branches, which themselves are not trained then: `train.lora`.

    Args:
        model: Detector, segmentor or classifier, which is changed.
        rank: Of the adapters, at least 1; None adds none. They are scaled by 2, and change nothing at first.

    Returns:
        peft's `LoraModel` around the branches of each PIIP.

    Raises:
        ConfigError: If peft is not installed.
    """
    if rank is None:
        return []
    check(rank >= 1, "train.lora", rank, "a rank of at least 1, or null for no adapters")
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise ConfigError(f"train.lora={rank}: needs the package peft: pip install peft") from None
    tuners = []
    for pyramid in [module for module in model.modules() if isinstance(module, PIIP)]:
        linears = [name for name, module in pyramid.branches.named_modules() if isinstance(module, nn.Linear)]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears)
        tuners.append(LoraModel(pyramid.branches, config, "default"))
    return tuners


def build_model(cfg: DictConfig) -> nn.Module:
    """The model of a configuration, with adapters if it has them (`train.lora`)."""
    model = instantiate(cfg.model)
    add_adapters(model, cfg.train.get("lora"))
    return model.to(cfg.train.device)


def load_trained(cfg: DictConfig, weights: str) -> nn.Module:
    """The model of a configuration with the weights of a checkpoint, adapters merged into them.

    Raises:
        CheckpointError: If the checkpoint is missing, broken or of another model.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    tuners = add_adapters(model, cfg.train.get("lora"))
    AtomicCheckpointer(model, strict=True).load(weights, checkpointables=[])
    for tuner in tuners:
        tuner.merge_and_unload()
    return model
