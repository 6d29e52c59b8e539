"""PIIP-SBL 1344/896/448, Mask R-CNN 1x on COCO.

Branch 1: ViT-L at 448 pixels, windows of 28
Branch 2: ViT-B at 896 pixels, windows of 28
Branch 3: ViT-S at 1344 pixels, windows of 28
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_sbl_1344_896_448",
    scale=(1344, 806),
    lr=1e-4,
    layer_decay=0.85,
)
