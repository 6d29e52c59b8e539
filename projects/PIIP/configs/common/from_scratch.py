"""DeiT III's recipe for training ViT-B from scratch on ImageNet-1K (arXiv 2204.07118; README_revenge.md of its code).

LAMB, binary cross entropy, 3-Augment, repeated augmentation, no label smoothing, 2048 images per iteration.
"""

from detectron2.config import LazyCall as L
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb

from .classifier import model
from .imagenet import data, dataloader
from .schedule_20ep import lr_multiplier, optimizer, train

train.epochs = 300
train.load_pretrained = False
train.ema.decay = None

transform = dataloader.train.mapper.transform
transform.auto_augment = "3a"  # one of grey, solarised and blurred
transform.color_jitter = 0.3
del transform
dataloader.train.total_batch_size = 2048
dataloader.train.repeats = 3

model.label_smoothing = 0.0
# Every class that is in the mixed image is to be found, whatever its share
model.loss = L(BinaryCrossEntropy)(smoothing="${..label_smoothing}", target_threshold=0.0)

optimizer = L(Lamb)(params=optimizer.params, lr=3e-3, weight_decay=0.05)
optimizer.params.interaction_lr_ratio = 1.0
optimizer.params.decay_vectors = False
