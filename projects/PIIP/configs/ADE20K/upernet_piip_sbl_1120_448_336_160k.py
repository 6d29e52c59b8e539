"""PIIP-SBL 1120/448/336, UperNet 160k on ADE20K.

Branch 1: ViT-L at 336 pixels, global attention
Branch 2: ViT-B at 448 pixels, windows of 28
Branch 3: ViT-S at 1120 pixels, windows of 28
"""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_sbl_1120_448_336_upernet",
    crop=1120,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
