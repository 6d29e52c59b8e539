"""ViT-B 640, windows of 28: UperNet 160k on ADE20K."""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "vit_b_640_upernet",
    crop=640,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
