"""Multi-scale deformable attention: the operators, their plain PyTorch reference, and the module built on them."""

from ._library import STATUS as operator_status  # noqa: N811  (it changes when the library is loaded)
from ._library import OperatorStatus
from .functional import deform_attn_grid, ms_deform_attn
from .module import MSDeformAttn
from .patching import patch
from .reference import deform_attn_grid_reference, make_reference_points, ms_deform_attn_reference

__all__ = [
    "MSDeformAttn",
    "OperatorStatus",
    "deform_attn_grid",
    "deform_attn_grid_reference",
    "make_reference_points",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "operator_status",
    "patch",
]
