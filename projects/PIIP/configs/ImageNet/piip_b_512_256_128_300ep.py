"""PIIP-B 512/256/128, windows of 16 in Branch 3: from scratch on ImageNet-1K.

By DeiT III's recipe for ViT-B (arXiv 2204.07118); branches of widths 160, 320 and 640.
"""

from detectron2.config import LazyCall as L
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb

from piip.recipes import classifier

model, data, dataloader, optimizer, lr_multiplier, train = classifier(
    "piip_b_512_256_128",
    batch_size=2048,
    lr=3e-3,
    interaction_lr_ratio=1.0,
    weight_decay=0.05,
    epochs=300,
    warmup_epochs=5,
    ema_decay=None,
)
train.load_pretrained = False
dataloader.train.repeats = 3
dataloader.train.mapper.transform.auto_augment = "3a"  # DeiT III's 3-Augment: one of grey, solarised and blurred
model.label_smoothing = 0.0
# Every class that is in the mixed image is to be found, whatever its share
model.loss = L(BinaryCrossEntropy)(smoothing="${..label_smoothing}", target_threshold=0.0)
optimizer = L(Lamb)(params=optimizer.params, lr=optimizer.lr, weight_decay=optimizer.weight_decay)
optimizer.params.decay_vectors = False
