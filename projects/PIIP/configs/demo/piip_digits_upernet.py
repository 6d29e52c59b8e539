"""UperNet on the label maps of the digit scenes: ten digits and the background, by the published rules throughout.

    python datasets/prepare.py digits
    python -m piip.digit_demo --classifier
    python tools/lazyconfig_train_net.py --config-file projects/PIIP/configs/demo/piip_digits_upernet.py --num-gpus 2

With OMP_NUM_THREADS=1: two processes with a thread each are faster than one with two. The second command pretrains the
backbone on single digits. Trains on crops of 128 pixels, tests with windows of that size, which overlap on the scenes.
"""

import dataclasses

from detectron2.config import LazyCall as L
from detectron2.data.transforms import RandomCrop_CategoryAreaConstraint
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from piip.data.label_maps import IGNORE_LABEL
from piip.lazy import lazy_dataclass
from piip.solver import WarmupFactor
from piip_core.config import MergingConfig
from piip_digits.model import NUM_GROUPS, demo_config

from ..common.ade20k import data, dataloader
from ..common.upernet import model
from .piip_digits_mask_rcnn import optimizer, train

data.train.images = "datasets/digits/train"
data.train.labels = "datasets/digits/labels/train"
data.train.crop = (128, 128)
data.test.images = "datasets/digits/val"
data.test.labels = "datasets/digits/labels/val"
data.test.short_side = 192  # the size of the scenes
data.classes = "datasets/digits/labels/names.txt"
data.num_classes = 11
# The scenes keep their size, and a mirrored 2 is no digit. Redrawing crops that are nearly all background matters here
dataloader.train.mapper.augmentations = [
    L(RandomCrop_CategoryAreaConstraint)(
        crop_type="absolute",
        crop_size="${data.train.crop}",
        single_category_max_area=0.75,
        ignored_category=IGNORE_LABEL,
    ),
]
dataloader.train.total_batch_size = 16
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0
dataloader.test.batch_size = 8

model.backbone.config = lazy_dataclass(dataclasses.replace(demo_config(), merging=MergingConfig(num_groups=NUM_GROUPS)))
model.backbone.pretrained = False
for _head, _channels in ((model.sem_seg_head, 64), (model.auxiliary_head, 32)):
    _head.channels = _channels
    _head.norm = "naiveSyncBN"
    _head.dropout = 0.0
    _head.init_std = 0.1  # with the published 0.01 and this learning rate, the backbone forgets the digits at once
model.train_size = 128
model.window = 128
model.stride = 64
model.window_batch_size = 3
model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]

# From random weights, heads that classify pixels take long to tell digits: start from the backbone of the classifier
train.init_checkpoint = "output/demo/classifier/backbone.safetensors"
train.output_dir = "output/demo/upernet"
train.max_iter = 500
train.eval_period = 250
train.checkpointer.period = 250

optimizer.lr = 8e-4

lr_multiplier = L(WarmupFactor)(
    scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=1.0),
    warmup_iters=20,
    warmup_factor=0.01,
    max_iter="${train.max_iter}",
)
