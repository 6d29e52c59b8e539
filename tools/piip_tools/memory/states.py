"""Memory of parameters, gradients, optimizer state and communication under ZeRO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from piip_core.deepspeed_start import BUCKET_SIZE, LIVE_PARAMETERS
from piip_core.errors import ConfigError

__all__ = ["STAGES", "ModelStates", "Offload", "model_states"]

Offload = Literal["none", "optimizer", "parameters"]

STAGES = (0, 1, 2, 3)
"""ZeRO stages; 0 is DistributedDataParallel, or a single process."""

# What `train.deepspeed` trains with: float32 weights and gradients, autocast in bfloat16, AdamW
_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32
_REDUCE_BUCKETS = 2  # communication overlaps with the backward pass


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes on one of the GPUs, and in the memory of its host, that do not depend on the batch.

    Attributes:
        parameters: Weights.
        gradients: What stays of the gradients until the optimizer's step.
        optimizer: AdamW's moments, and in stages 1 and 2 the copy of the weights that it updates.
        communication: Buckets that gradients and weights travel in, and the weights that stage 3 has gathered.
        step: What the optimizer's step takes for itself while activations take nothing.
        whole: The whole weights with what else is there: alone before they are divided, in stage 3 again, as a copy,
            while the model is evaluated.
        host: In the memory of the host, per GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    step: int
    whole: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the GPU during the forward and the backward pass."""
        return self.parameters + self.gradients + self.optimizer + self.communication


def model_states(
    params: int, stage: int, gpus: int, offload: Offload = "none", bucket_size: int = BUCKET_SIZE
) -> ModelStates:
    """Memory of a model on one of `gpus` GPUs.

    Args:
        params: Trained parameters.
        stage: One of `STAGES`.
        gpus: Processes, one per GPU, over all machines.
        offload: What the host keeps: "optimizer" from stage 1 on, "parameters" (and the optimizer) in stage 3.
        bucket_size: Elements of the reduce and all-gather buckets.

    Raises:
        ConfigError: For a stage that does not exist or cannot be offloaded like this, or without a GPU.
    """
    if stage not in STAGES:
        raise ConfigError(f"ZeRO stage {stage}: expected one of {STAGES}")
    if gpus < 1:
        raise ConfigError(f"gpus={gpus}: expected at least 1")
    if stage < {"none": 0, "optimizer": 1, "parameters": 3}[offload]:
        raise ConfigError(f"ZeRO stage {stage} with {offload} on the host: expected a higher stage")
    part = -(-params // gpus)
    weights = _FLOAT32 * params
    if stage == 0:
        # DDP copies gradients into buckets of its own; AdamW's step keeps one temporary per parameter
        buckets = weights if gpus > 1 else 0
        return ModelStates(
            parameters=weights,
            gradients=weights,
            optimizer=_MOMENTS * params,
            communication=buckets,
            step=weights,
            whole=weights,
        )
    weights_here = _FLOAT32 * (part if stage == 3 else params)
    gathered = _FLOAT32 * (min(LIVE_PARAMETERS, params) if stage == 3 else bucket_size)
    master = 0 if stage == 3 and offload == "none" else _FLOAT32 * part  # stage 3 updates the weights where they are
    optimizer = master + _MOMENTS * part
    on_gpu = {"parameters": weights_here, "optimizer": optimizer}
    host = 0
    for name in {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "parameters")}[offload]:
        host += on_gpu[name]
        on_gpu[name] = 0
    return ModelStates(
        **on_gpu,
        gradients=weights if stage == 1 else _FLOAT32 * part,
        communication=_REDUCE_BUCKETS * _FLOAT32 * bucket_size + gathered,
        step=(2 if stage == 1 else 1) * _FLOAT32 * part,  # stage 1 also copies its part of the gradients
        whole=weights + sum(on_gpu.values()) if stage == 3 else weights,
        host=host,
    )
