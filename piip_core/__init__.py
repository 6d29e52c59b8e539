"""Parameter-Inverted Image Pyramid Networks: branches, interactions, merging and the operator that joins them."""

from .classifier import PIIPClassifier
from .classifier_config import ClassifierConfig
from .config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from .errors import ConfigError, UserError
from .networks import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig
from .prepared import prepare_for_inference
from .pyramid import PIIP, DensePIIP
from .timm_network import TimmConfig

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
