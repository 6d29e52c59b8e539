"""Branch networks: one thin adapter per family around a library's model, all behind the `Branch` contract."""

from .base import Branch, BranchState, build_branch, register_branch
from .vit import ViTBranch

__all__ = ["Branch", "BranchState", "ViTBranch", "build_branch", "register_branch"]
