"""Branch networks: one thin adapter per family around a library's model, all behind the `Branch` contract."""

from .base import Branch, BranchState, build_branch, register_branch
from .beit import BEiTBranch
from .convnext import ConvNeXtBranch
from .timm_model import TimmTransformerBranch
from .vit import UniPerceiverBranch, ViTBranch

__all__ = [
    "BEiTBranch",
    "Branch",
    "BranchState",
    "ConvNeXtBranch",
    "TimmTransformerBranch",
    "UniPerceiverBranch",
    "ViTBranch",
    "build_branch",
    "register_branch",
]
