"""The length of a training in epochs, for LazyConfigs."""

from __future__ import annotations

import math

from omegaconf import OmegaConf

__all__ = ["RESOLVER", "iterations", "register"]

RESOLVER = "piip.iterations"


def iterations(epochs: float, images: int, batch_size: int) -> int:
    """Iterations of a number of epochs; as in timm, an epoch leaves out the images of a batch that is not full.

    A LazyConfig says `${piip.iterations:EPOCHS,IMAGES,BATCH_SIZE}`, each of them a number or an interpolation, and
    follows a change of any.
    """
    return max(math.floor(epochs * max(images // batch_size, 1)), 1)


def register() -> None:
    """Makes `iterations` known to OmegaConf."""
    OmegaConf.register_new_resolver(RESOLVER, iterations, replace=True)
