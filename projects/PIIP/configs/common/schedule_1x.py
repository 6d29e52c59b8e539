"""The published 1x schedule: 12 epochs of COCO train2017 at 16 images per iteration, AdamW with layer decay."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from piip.solver import layer_decay_params

from .train import train

# 117266 of 118287 images have annotations: 117266 / 16 = 7330 iterations per epoch
_EPOCH = 7330

train.max_iter = 12 * _EPOCH
train.eval_period = _EPOCH
train.checkpointer = {"period": _EPOCH, "max_to_keep": 3}
train.amp.enabled = True  # in bfloat16, as the published backbones

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[8 * _EPOCH, 11 * _EPOCH],
        num_updates=train.max_iter,
    ),
    warmup_length=500 / train.max_iter,
    warmup_factor=0.001,
)

optimizer = L(torch.optim.AdamW)(
    params=L(layer_decay_params)(
        # params.model is set by the training script
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        decay_rate=0.85,
    ),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)
