"""The published ADE20K schedule: 80000 iterations, AdamW with layer decay, the rate falling in a line to 0.

Longer training is one number: train.max_iter=160000
"""

import torch
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from piip.solver import WarmupFactor, layer_decay_params

from .train import train

train.max_iter = 80_000
train.eval_period = 8_000
train.checkpointer = {"period": 8_000, "max_to_keep": 3}
train.amp.enabled = True  # in bfloat16, as the published backbones

lr_multiplier = L(WarmupFactor)(
    scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=1.0),
    warmup_iters=1500,
    warmup_factor=1e-6,
    max_iter="${train.max_iter}",
)

optimizer = L(torch.optim.AdamW)(
    params=L(layer_decay_params)(
        # params.model is set by the training script
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        decay_rate=0.95,
    ),
    lr=4e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)
