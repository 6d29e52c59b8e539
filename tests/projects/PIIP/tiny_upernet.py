"""An UperNet on a PIIP of two small ViTs, for folders of images and label maps. A LazyConfig."""

import torch
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from piip.solver import WarmupFactor, layer_decay_params

from ....projects.PIIP.configs.common.ade20k import data, dataloader
from ....projects.PIIP.configs.common.train import train
from ....projects.PIIP.configs.common.upernet import model
from .tiny_piip_mask_rcnn import model as _mask_rcnn

model.backbone = _mask_rcnn.backbone.bottom_up
model.sem_seg_head.channels = model.auxiliary_head.channels = 16
model.sem_seg_head.norm = model.auxiliary_head.norm = "BN"
model.train_size = model.window = 64
model.stride = 32
model.pixel_std = [127.5, 127.5, 127.5]

data.train.scale = (256, 64)
data.train.crop = (64, 64)
data.test.short_side = 64
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0

train.device = "cpu"
train.max_iter = 4
train.eval_period = 0
train.log_period = 2

optimizer = L(torch.optim.AdamW)(
    params=L(layer_decay_params)(base_lr="${..lr}", weight_decay="${..weight_decay}", decay_rate=0.95),
    lr=1e-3,
    weight_decay=0.05,
)
lr_multiplier = L(WarmupFactor)(
    scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=1.0),
    warmup_iters=1,
    warmup_factor=0.1,
    max_iter="${train.max_iter}",
)
