"""Parameter-Inverted Image Pyramid Networks: branches, interactions, merging and the operator that joins them."""

from .config import BranchConfig, ConfigError, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig
from .pyramid import PIIP, DensePIIP

__all__ = [
    "PIIP",
    "BranchConfig",
    "ConfigError",
    "DensePIIP",
    "InteractionConfig",
    "MergingConfig",
    "PIIPConfig",
    "ViTConfig",
]

__version__ = "0.1.0"
