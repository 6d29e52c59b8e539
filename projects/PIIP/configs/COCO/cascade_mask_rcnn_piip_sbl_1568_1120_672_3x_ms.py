"""PIIP-SBL 1568/1120/672, Cascade R-CNN 3x with multi-scale training on COCO.

Branch 1: ViT-L at 672 pixels, windows of 28
Branch 2: ViT-B at 1120 pixels, windows of 28
Branch 3: ViT-S at 1568 pixels, windows of 28
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_sbl_1568_1120_672_cascade_3x_ms",
    scale=(2041, 1225),
    crop=1568,
    lr=1e-4,
    layer_decay=0.85,
    epochs=36,
    lr_drops=(27, 33),
)
