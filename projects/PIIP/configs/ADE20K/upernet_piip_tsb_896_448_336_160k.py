"""PIIP-TSB 896/448/336, windows of 28 in Branches 2 and 3: UperNet 160k on ADE20K."""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_tsb_896_448_336_upernet",
    crop=896,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
