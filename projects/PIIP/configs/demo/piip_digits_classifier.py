"""The demo's pyramid as a classifier of the real digits, from random weights: at least 97 % in less than three minutes.

    python datasets/prepare.py digits --single
    OMP_NUM_THREADS=1 python tools/lazyconfig_train_net.py --num-gpus 2 \\
        --config-file projects/PIIP/configs/demo/piip_digits_classifier.py

Two processes with a thread each are faster than one with two. What comes out starts other models with this pyramid:
train.init_checkpoint=output/demo/digits/model_final.pth
"""

import dataclasses

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomAffine

from piip.recipes import classifier
from piip_core.config import ClassifierConfig
from piip_digits.model import NUM_GROUPS, demo_config

# One head on the merged branches, as in the publication's training from scratch; digits are then about as large as in
# the scenes
_pyramid = dataclasses.replace(demo_config(image_size=64), merging=None)
model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    ClassifierConfig(pyramid=_pyramid, head="merged", num_groups=NUM_GROUPS, num_classes=10),
    batch_size=64,
    lr=3e-3,
    interaction_lr_ratio=1.0,
    weight_decay=0.05,
    epochs=30,
    warmup_epochs=3,
    ema_decay=None,  # the rate falls to 0: an average would be no better
    output_dir="output/demo/digits",
)

data.train.images = "datasets/digit_images/train"
data.train.num_images = 1343
data.test.images = "datasets/digit_images/val"
data.num_classes = 10

# Digits lean and wander, but a mirrored 2 is none
dataloader.train.mapper.transform = L(Compose)(
    transforms=[
        L(RandomAffine)(
            degrees=12,
            translate=(0.08, 0.08),
            scale=(0.9, 1.1),
            shear=8,
            interpolation=InterpolationMode.BILINEAR,
        ),
        L(PILToTensor)(),
    ]
)
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0
dataloader.evaluator.topk = [1]

model.pixel_mean = [127.5, 127.5, 127.5]
model.pixel_std = [127.5, 127.5, 127.5]
model.mixup = None
model.label_smoothing = 0.0

train.device = "cpu"
train.load_pretrained = False
train.eval_period = 200
train.checkpointer = {"period": 200, "max_to_keep": 1}
train.log_period = 20
train.clip_norm = 1.0
train.amp.enabled = False

optimizer.betas = (0.9, 0.98)
optimizer.params.decay_vectors = False

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.1,
    warmup_factor=0.01,
)
