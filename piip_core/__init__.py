"""Parameter-Inverted Image Pyramid Networks: branches, interactions, merging and the operator that joins them."""

from .config import BranchConfig, InteractionConfig, MergingConfig, PIIPConfig
from .errors import ConfigError, UserError
from .networks import ViTConfig
from .pyramid import PIIP, DensePIIP

__all__ = [
    "PIIP",
    "BranchConfig",
    "ConfigError",
    "DensePIIP",
    "InteractionConfig",
    "MergingConfig",
    "PIIPConfig",
    "UserError",
    "ViTConfig",
]

__version__ = "0.1.0"
