"""How much memory a training takes on each GPU, without allocating it.

Activations come from a training step on tensors without data (`DryRun`), parameters, gradients, optimizer state and
communication from their number and the ZeRO stage (`model_states`).
"""

from .dry_run import AliveStorages, DryRun, backbone_step, squares
from .estimate import MemoryReport, Setting, estimate_memory, memory_table, model_states

__all__ = [
    "AliveStorages",
    "DryRun",
    "MemoryReport",
    "Setting",
    "backbone_step",
    "estimate_memory",
    "memory_table",
    "model_states",
    "squares",
]
