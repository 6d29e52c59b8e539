"""PIIP-TSB 1120/896/448, Mask R-CNN 1x on COCO.

Branch 1: ViT-B at 448 pixels, windows of 14
Branch 2: ViT-S at 896 pixels, windows of 14
Branch 3: ViT-T at 1120 pixels, windows of 14
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_tsb_1120_896_448",
    scale=(1120, 672),
    lr=1e-4,
    layer_decay=0.85,
)
