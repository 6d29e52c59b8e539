"""PIIP-SBL 1120/448/336, windows of 28 in Branches 2 and 3: UperNet 160k on ADE20K."""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_sbl_1120_448_336_upernet",
    crop=1120,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
