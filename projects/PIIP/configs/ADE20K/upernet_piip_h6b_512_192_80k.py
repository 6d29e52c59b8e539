"""PIIP-H6B 512/192, global attention: UperNet 80k on ADE20K."""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "piip_h6b_512_192_upernet",
    crop=512,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=80_000,
)
