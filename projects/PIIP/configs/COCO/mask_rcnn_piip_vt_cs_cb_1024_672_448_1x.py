"""PIIP-VT-CS-CB 1024/672/448, Mask R-CNN 1x on COCO.

Branch 1: ConvNeXt-B at 448 pixels
Branch 2: ConvNeXt-S at 672 pixels
Branch 3: ViT-T at 1024 pixels, windows of 14
"""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_vt_cs_cb_1024_672_448",
    scale=(1333, 800),
    lr=2e-4,
    layer_decay=0.8,
)
