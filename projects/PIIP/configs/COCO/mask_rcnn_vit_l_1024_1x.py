"""ViT-L 1024, Mask R-CNN 1x on COCO.

Branch 1: ViT-L at 1024 pixels, windows of 14 but every third block global
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "vit_l_1024",
    scale=(1024, 614),
    lr=1e-4,
    layer_decay=0.95,
)
