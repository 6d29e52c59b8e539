"""PIIP-SBL 1120/672/448, Mask R-CNN 1x on COCO.

Branch 1: ViT-L at 448 pixels, windows of 28
Branch 2: ViT-B at 672 pixels, windows of 28
Branch 3: ViT-S at 1120 pixels, windows of 28
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_sbl_1120_672_448",
    scale=(1120, 672),
    lr=1e-4,
    layer_decay=0.85,
)
