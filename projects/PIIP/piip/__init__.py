"""PIIP for Detectron2: backbone, published training settings, data, training and prediction."""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detector import Detector

__all__ = ["Detector"]

if importlib.util.find_spec("detectron2") is not None:  # the demo trains a classifier without it
    # saved configurations use their resolvers, and import anything of ours before
    from . import setting_types as setting_types
    from . import solver as solver


def __getattr__(name: str) -> Any:
    if name != "Detector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .detector import Detector  # loads all of PyTorch and Detectron2

    return Detector
