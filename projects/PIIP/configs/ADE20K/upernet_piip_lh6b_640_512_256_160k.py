"""PIIP-LH6B 640/512/256, windows of 14: UperNet 160k on ADE20K."""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_lh6b_640_512_256_upernet",
    crop=640,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
