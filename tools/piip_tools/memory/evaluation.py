"""Memory that evaluating a model takes, before anything is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from piip_core import PIIPClassifier
from piip_core.meta import on_meta
from piip_tools.flops.executed import padded_size

from .dry_run import DryRun, Precision


def detectron2_memory(cfg: Any, *, precision: Precision) -> int:
    """Bytes of a LazyConfig's model with float32 weights, and of its backbone's activations in one test batch.

    Images are taken as large as in training. Heads count with their weights alone.
    """
    from detectron2.config import instantiate

    from piip.lazy_config import skip_pretrained, training_size

    from .training_steps import size_divisor

    skip_pretrained(cfg)
    with on_meta():
        model = instantiate(cfg.model)
    size = padded_size(*training_size(cfg), size_divisor(model))
    images = cfg.dataloader.test.get("batch_size", 1)

    def step(model: nn.Module) -> Any:
        batch = torch.empty(images, 3, *size)
        return PIIPClassifier.forward(model, batch) if isinstance(model, PIIPClassifier) else model.backbone(batch)

    weights = _nbytes(model)
    return weights + DryRun(model).inference(step, precision=precision)


def chat_memory(name: str, dtype: torch.dtype) -> int:
    """Bytes of the weights of a published chat model; a conversation takes little beside them."""
    from piip_tools.benchmarks.chat import build_pair

    return _nbytes(build_pair(name, device="meta", dtype=dtype)[0].model)


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
