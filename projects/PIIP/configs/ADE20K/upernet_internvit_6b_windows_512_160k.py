"""InternViT-6B 512, windows of 14: UperNet 160k on ADE20K."""

from piip.recipes import segmentor

model, data, dataloader, optimizer, lr_multiplier, train = segmentor(
    "internvit_6b_windows_512_upernet",
    crop=512,
    lr=4e-5,
    layer_decay=0.95,
    max_iter=160_000,
)
