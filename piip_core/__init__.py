"""Parameter-Inverted Image Pyramid Networks: branches, interactions, merging and the operator that joins them."""

from .config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from .errors import ConfigError, UserError
from .networks import BEiTConfig, ConvNeXtConfig, UniPerceiverConfig, ViTConfig
from .pyramid import PIIP, DensePIIP
from .timm_network import TimmConfig

__all__ = [
    "PIIP",
    "BEiTConfig",
    "BranchConfig",
    "ConfigError",
    "ConvNeXtConfig",
    "DensePIIP",
    "InteractionConfig",
    "MergingConfig",
    "PIIPConfig",
    "TimmConfig",
    "UniPerceiverConfig",
    "UserError",
    "ViTConfig",
]

__version__ = "0.1.0"
