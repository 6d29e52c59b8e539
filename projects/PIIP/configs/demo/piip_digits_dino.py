"""The demo's pyramid under a small DINO, which learns to find handwritten digits on photographs on two CPU cores.

    python datasets/prepare_digits.py
    python tools/lazyconfig_train_net.py --config-file projects/PIIP/configs/demo/piip_digits_dino.py --num-gpus 2

With OMP_NUM_THREADS=1: two processes with a thread each are faster than one with two.
"""

import dataclasses

from piip.lazy import lazy_dataclass
from piip_core import MergingConfig
from piip_core.demo.model import NUM_GROUPS, demo_config

from ..common.dino import model
from .piip_digits_mask_rcnn import data, dataloader, lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False  # DINO learns from boxes alone

# Three maps of the pyramid, and a fourth of stride 64 that the neck makes, as in the large models
model.backbone.config = lazy_dataclass(
    dataclasses.replace(demo_config(), merging=MergingConfig(out_strides=(8, 16, 32), num_groups=NUM_GROUPS))
)
model.backbone.pad_divisor = 32
model.backbone.pretrained = False
model.num_groups = NUM_GROUPS
model.max_detections = 100

# A handful of digits per scene, and minutes to learn them: a small transformer
model.transformer.embed_dim = 64
model.transformer.num_heads = 4
model.transformer.ffn_dim = 256
model.transformer.num_encoder_layers = 1
model.transformer.num_decoder_layers = 2
model.transformer.num_queries = 100
model.denoising.num_denoising = 50

# Ten digits are told apart from few examples: without this, boxes are learned long before classes
model.criterion.class_weight = 2.0

train.output_dir = "output/demo/dino"
train.max_iter = 600
train.eval_period = 150
train.checkpointer = {"period": 150, "max_to_keep": 1}
train.clip_norm = 1.0
