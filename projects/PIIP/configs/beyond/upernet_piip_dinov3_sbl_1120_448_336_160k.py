"""PIIP dinov3:s,b,l 1120/448/336: UperNet 160k on ADE20K.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import segmentor

# Rate and decay of the published pyramids with UperNet
model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "upernet_piip_dinov3_sbl_1120_448_336_160k",
    crop=1120,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
