"""Parameter-Inverted Image Pyramid Networks: branches, interactions, merging and the operator that joins them."""

from .branches import BEiTConfig, BranchConfig, ConvNeXtConfig, TimmConfig, UniPerceiverConfig, ViTConfig
from .classifier import PIIPClassifier
from .config import ClassifierConfig, InteractionConfig, MergingConfig, PIIPConfig
from .errors import ConfigError, UserError
from .prepared import prepare_for_inference
from .pyramid import PIIP, DensePIIP

__all__ = [
    "PIIP",
    "BEiTConfig",
    "BranchConfig",
    "ClassifierConfig",
    "ConfigError",
    "ConvNeXtConfig",
    "DensePIIP",
    "InteractionConfig",
    "MergingConfig",
    "PIIPClassifier",
    "PIIPConfig",
    "TimmConfig",
    "UniPerceiverConfig",
    "UserError",
    "ViTConfig",
    "prepare_for_inference",
]

__version__ = "0.1.0"
