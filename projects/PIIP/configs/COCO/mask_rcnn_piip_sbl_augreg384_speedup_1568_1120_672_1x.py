"""PIIP-SBL, AugReg (384), speed-up 1568/1120/672, Mask R-CNN 1x on COCO.

Branch 1: ViT-L at 672 pixels, windows of 28
Branch 2: ViT-B at 1120 pixels, windows of 28
Branch 3: ViT-S at 1568 pixels, windows of 28
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_sbl_augreg384_speedup_1568_1120_672",
    scale=(1568, 941),
    lr=1e-4,
    layer_decay=0.85,
)
