"""Precision of a model: autocast in training and in evaluation, of all of it or of its backbone alone."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from piip.modeling.backbone import PIIPBackbone
from piip_core.errors import ConfigError

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_precision(cfg: DictConfig) -> torch.dtype | None:
    """That of autocast by `train.amp`; None without.

    Raises:
        ConfigError: If it is neither bfloat16 nor, on CUDA, float16.
    """
    if not cfg.train.amp.enabled:
        return None
    precision, on_cuda = cfg.train.amp.get("precision", "bfloat16"), torch.device(cfg.train.device).type == "cuda"
    if precision != "bfloat16" and not (precision == "float16" and on_cuda):
        raise ConfigError(
            f"train.amp.precision={precision!r} on {cfg.train.device}: expected 'bfloat16', or 'float16' on CUDA"
        )
    return _DTYPES[precision]


def evaluation_precision(cfg: DictConfig) -> torch.dtype | None:
    """That of autocast by `train.eval_precision`; None for float32.

    Raises:
        ConfigError: If it is no precision.
    """
    precision = OmegaConf.select(cfg, "train.eval_precision", default="float32")
    if precision == "training":
        return training_precision(cfg)
    if precision not in _DTYPES:
        raise ConfigError(f"train.eval_precision={precision!r}: expected 'training' or one of {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def set_precision(model: nn.Module, cfg: DictConfig, *, cache_enabled: bool = True) -> None:
    """Makes a model run in the precisions of its configuration; with `train.amp.float32_heads` its backbone alone.

    Autocast is entered inside the model, since DeepSpeed turns off what is turned on around its engine. Losses are not
    scaled here: bfloat16 has the range of float32.

    Args:
        model: Detector, segmentor or classifier on its device; its `forward` is replaced.
        cfg: With `train`.
        cache_enabled: Whether autocast keeps the copies of the weights to the end of the forward pass.

    Raises:
        ConfigError: If a precision is none, or heads are to be float32 in a model without a `PIIPBackbone`.
    """
    dtypes = {True: training_precision(cfg), False: evaluation_precision(cfg)}
    if not any(dtypes.values()):
        return
    if not OmegaConf.select(cfg, "train.amp.float32_heads", default=False):
        _autocast(model, dtypes, cfg.train.device, cache_enabled)
        return
    backbones = [module for module in model.modules() if isinstance(module, PIIPBackbone)]
    if not backbones:
        raise ConfigError(
            f"train.amp.float32_heads=True: expected false for {type(model).__name__}, which has no PIIPBackbone"
        )
    _autocast(model, {True: None, False: None}, cfg.train.device, cache_enabled)
    for backbone in backbones:
        _autocast(backbone, dtypes, cfg.train.device, cache_enabled)
        backbone.register_forward_hook(lambda _module, _images, maps: {name: map.float() for name, map in maps.items()})


def _autocast(module: nn.Module, dtypes: dict[bool, torch.dtype | None], device: str, cache_enabled: bool) -> None:
    """Runs a module under autocast, in training and not, and without where that says None."""
    forward, device_type = module.forward, torch.device(device).type

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = dtypes[module.training]
        with torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=cache_enabled):
            return forward(*args, **kwargs)

    module.forward = run
