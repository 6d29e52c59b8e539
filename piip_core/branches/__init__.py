"""Branch networks: one thin adapter per family around a library's model, all with the `Branch` contract.

A module has the configuration of its families beside their branches; `register_branch` makes them known.
"""

from .base import Branch, BranchConfig, BranchState, NetworkConfig, build_branch, register_branch
from .beit import BEiTConfig
from .convnext import ConvNeXtConfig
from .timm_model import TimmConfig
from .transformer import PlainTransformerConfig
from .vit import UniPerceiverConfig, ViTConfig

__all__ = [
    "BEiTConfig",
    "Branch",
    "BranchConfig",
    "BranchState",
    "ConvNeXtConfig",
    "NetworkConfig",
    "PlainTransformerConfig",
    "TimmConfig",
    "UniPerceiverConfig",
    "ViTConfig",
    "build_branch",
    "register_branch",
]
