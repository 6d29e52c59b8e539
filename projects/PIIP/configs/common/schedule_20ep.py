"""The published fine-tuning: 20 epochs at 1024 images per iteration, AdamW, ten times the rate for interactions.

Epochs are those of the training images, however many there are (`data.train.num_images`).
"""

import torch
from detectron2.config import LazyCall as L

from piip.solver import CosineToMinimum, classifier_params

from .train import train

_BATCH = "${data.train.num_images},${dataloader.train.total_batch_size}"

train.epochs = 20
train.warmup_epochs = 5
train.max_iter = "${piip.iterations:${train.epochs}," + _BATCH + "}"
train.eval_period = "${piip.iterations:1," + _BATCH + "}"
train.checkpointer = {"period": "${piip.iterations:1," + _BATCH + "}", "max_to_keep": 3}
train.amp.enabled = True
train.ema.decay = 0.99996

lr_multiplier = L(CosineToMinimum)(
    max_iter="${train.max_iter}",
    warmup_iters="${piip.iterations:${train.warmup_epochs}," + _BATCH + "}",
    warmup_lr=1e-6,
    min_lr=1e-5,
)

optimizer = L(torch.optim.AdamW)(
    params=L(classifier_params)(
        # params.model is set by the training script
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        interaction_lr_ratio=10.0,
        head_lr_ratio=1.0,  # 10 or more for new classes
        decay_vectors=True,  # as published; False exempts biases, norms, position embeddings and class tokens
    ),
    lr=3e-5,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)
