"""A Mask R-CNN small enough for tests: Detectron2's own parts, our data pipeline. A LazyConfig."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ....projects.PIIP.configs.common.coco import data, dataloader
from ....projects.PIIP.configs.common.train import train

_widths = [8, 16, 32, 64]
_strides = [1, 2, 2, 2]

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            in_channels=before,
            out_channels=width,
            stride_per_block=[stride],
            norm="BN",
        )
        for before, width, stride in zip([8, *_widths], _widths, _strides, strict=False)
    ],
    out_features=["res2", "res3", "res4", "res5"],
)
model.backbone.out_channels = 16
model.proposal_generator.head.in_channels = 16
model.proposal_generator.pre_nms_topk = (200, 100)
model.proposal_generator.post_nms_topk = (50, 50)
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.roi_heads.num_classes = "${data.num_classes}"
model.roi_heads.batch_size_per_image = 32
model.roi_heads.box_head.input_shape.channels = 16
model.roi_heads.box_head.fc_dims = [32]
model.roi_heads.box_predictor.input_shape.channels = 32
model.roi_heads.mask_head.input_shape.channels = 16
model.roi_heads.mask_head.conv_dims = [16, 16]
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]
model.input_format = "RGB"

data.train.scales = [(128, 96)]
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0

train.device = "cpu"
train.max_iter = 4
train.eval_period = 0
train.log_period = 1
train.checkpointer.period = 2

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=1e-3,
    weight_decay=0.05,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[90], num_updates=100),
    warmup_length=0.5,
    warmup_factor=0.1,
)
