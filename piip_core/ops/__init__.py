"""Multi-scale deformable attention: the operator, its plain PyTorch reference, and the module built on it."""

from ._library import STATUS as operator_status
from ._library import OperatorStatus
from .functional import ms_deform_attn
from .module import MSDeformAttn, make_reference_points
from .reference import ms_deform_attn_reference

__all__ = [
    "MSDeformAttn",
    "OperatorStatus",
    "make_reference_points",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "operator_status",
]
