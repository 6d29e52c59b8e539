"""PIIP-LH6B 1280/1024/256, Mask R-CNN 1x with multi-scale training on COCO.

Branch 1: InternViT-6B at 256 pixels, windows of 14
Branch 2: ViT-H at 1024 pixels, windows of 14
Branch 3: ViT-L at 1280 pixels, windows of 14
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_lh6b_1280_1024_256",
    scale=(1666, 1000),
    crop=1280,
    lr=1e-4,
    layer_decay=0.85,
)
