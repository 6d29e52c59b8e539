"""PIIP-H6B 512/512, UperNet 80k on ADE20K.

Branch 1: InternViT-6B at 512 pixels, global attention
Branch 2: ViT-H at 512 pixels, global attention
"""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_h6b_512_512_upernet",
    crop=512,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=80_000,
)
