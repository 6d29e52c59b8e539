"""InternViT-6B 1024, Mask R-CNN 1x with multi-scale training on COCO.

Branch 1: InternViT-6B at 1024 pixels, global attention
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "internvit_6b_1024",
    scale=(1333, 800),
    crop=1024,
    lr=1e-4,
    layer_decay=0.95,
)
