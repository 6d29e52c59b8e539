"""The demo: a small three-branch PIIP Mask R-CNN learns to find handwritten digits on photographs, on two CPU cores.

`python -m piip.digit_demo` builds the data set and starts this.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from piip.lazy import lazy_dataclass
from piip.modeling import PIIPFPN, PIIPBackbone, published_mask_rcnn
from piip.solver import layer_decay_params
from piip_digits.model import demo_config

from ..common.coco import data, dataloader
from ..common.train import train

_FEATURES = ["p2", "p3", "p4"]
_STRIDES = [4, 8, 16]
_CHANNELS = 64

data.train.annotations = "datasets/digits/annotations/instances_train.json"
data.train.images = "datasets/digits/train"
data.train.scales = [[192, 192]]  # the size of the scenes
data.test.annotations = "datasets/digits/annotations/instances_val.json"
data.test.images = "datasets/digits/val"
del dataloader.train.mapper.augmentations[1]  # no flips: a mirrored 2 is no digit
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0
dataloader.test.batch_size = 8

model = published_mask_rcnn()
model.backbone = L(PIIPFPN)(
    bottom_up=L(PIIPBackbone)(config=lazy_dataclass(demo_config()), pad_divisor=16, pretrained=False),
    in_features=["res2", "res3", "res4"],
    out_channels=_CHANNELS,
)
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]
model.input_format = "RGB"

# Digits are 20 to 80 pixels high: one anchor size per level, two shapes, and few boxes suffice
rpn = model.proposal_generator
rpn.in_features = _FEATURES
rpn.head.in_channels = _CHANNELS
rpn.head.num_anchors = 2
rpn.anchor_generator.sizes = [[24], [48], [96]]
rpn.anchor_generator.aspect_ratios = [1.0, 1.8]
rpn.anchor_generator.strides = _STRIDES
rpn.batch_size_per_image = 64
rpn.pre_nms_topk = (400, 300)
rpn.post_nms_topk = (150, 100)

# Small heads
roi_heads = model.roi_heads
roi_heads.num_classes = "${data.num_classes}"
roi_heads.batch_size_per_image = 32
roi_heads.positive_fraction = 0.5
roi_heads.box_in_features = _FEATURES
roi_heads.box_pooler.scales = [1 / stride for stride in _STRIDES]
roi_heads.box_pooler.canonical_box_size = 64  # from this size on, boxes are read from the middle level
roi_heads.box_pooler.canonical_level = 3
roi_heads.mask_in_features = _FEATURES[:1]  # strokes are a few pixels wide
roi_heads.mask_pooler.scales = [1 / _STRIDES[0]]
for _pooler in (roi_heads.box_pooler, roi_heads.mask_pooler):
    _pooler.sampling_ratio = 2
roi_heads.box_head.input_shape.channels = _CHANNELS
roi_heads.box_head.fc_dims = [256, 256]
roi_heads.box_predictor.input_shape.channels = 256
roi_heads.mask_head.input_shape.channels = _CHANNELS
roi_heads.mask_head.conv_dims = [_CHANNELS] * 3
roi_heads.mask_head.num_classes = 1  # one mask for all classes: a stroke is a stroke
del rpn, roi_heads  # parts of the model, no nodes of their own

train.output_dir = "output/demo/detector"
train.device = "cpu"
train.max_iter = 600
train.eval_period = 150
train.checkpointer = {"period": 150, "max_to_keep": 1}
train.log_period = 20

optimizer = L(torch.optim.AdamW)(
    params=L(layer_decay_params)(base_lr="${..lr}", weight_decay="${..weight_decay}", decay_rate=1.0),
    lr=1.5e-3,
    betas=(0.9, 0.98),
    weight_decay=0.05,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=50 / train.max_iter,
    warmup_factor=0.01,
)
