"""PIIP-TSB 896/448/336, UperNet 160k on ADE20K.

Branch 1: ViT-B at 336 pixels, global attention
Branch 2: ViT-S at 448 pixels, windows of 28
Branch 3: ViT-T at 896 pixels, windows of 28
"""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_tsb_896_448_336_upernet",
    crop=896,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
