"""The demo's pyramid under a small DINO, which learns to find handwritten digits on photographs on two CPU cores.

From random weights boxes are learned long before classes, so it starts from the demo's classifier of single digits:

    python datasets/prepare.py digits
    python -m piip.digit_demo --classifier
    OMP_NUM_THREADS=1 python tools/lazyconfig_train_net.py --num-gpus 2 \\
        --config-file projects/PIIP/configs/demo/piip_digits_dino.py

Two processes with a thread each are faster than one with two.
"""

import dataclasses

from piip.lazy import lazy_dataclass
from piip_core import MergingConfig
from piip_digits.model import NUM_GROUPS, demo_config

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

# A handful of digits per scene, and minutes to learn them: few layers, but many heads, because each reads one place and
# a digit is told by several
model.transformer.embed_dim = 128
model.transformer.num_heads = 16
model.transformer.ffn_dim = 256
model.transformer.num_encoder_layers = 1
model.transformer.num_decoder_layers = 2
model.transformer.num_queries = 100
model.denoising.num_denoising = 50

# Boxes are learned soon all the same
model.criterion.class_weight = 6.0

train.output_dir = "output/demo/dino"
train.init_checkpoint = "output/demo/classifier/backbone.safetensors"
train.max_iter = 800
train.eval_period = 400
train.checkpointer = {"period": 400, "max_to_keep": 1}
train.clip_norm = 1.0
