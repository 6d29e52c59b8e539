"""Branch networks: one thin adapter per family around a library's model, all with the `Branch` contract.

A module has the configuration of its families beside their branches; `register_branch` makes them known.
"""

from .base import Branch, BranchConfig, BranchState, NetworkConfig, build_branch, register_branch
from .beit import BEiTBranch, BEiTConfig
from .convnext import ConvNeXtBranch, ConvNeXtConfig
from .timm_model import TimmConfig, TimmTransformerBranch
from .vit import UniPerceiverBranch, UniPerceiverConfig, ViTBranch, ViTConfig

__all__ = [
    "BEiTBranch",
    "BEiTConfig",
    "Branch",
    "BranchConfig",
    "BranchState",
    "ConvNeXtBranch",
    "ConvNeXtConfig",
    "NetworkConfig",
    "TimmConfig",
    "TimmTransformerBranch",
    "UniPerceiverBranch",
    "UniPerceiverConfig",
    "ViTBranch",
    "ViTConfig",
    "build_branch",
    "register_branch",
]
