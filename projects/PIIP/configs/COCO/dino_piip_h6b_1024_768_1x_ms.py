"""PIIP-H6B 1024/768, global attention: DINO 1x with multi-scale training on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_h6b_1024_768_dino",
    crop=1024,
    batch_size=32,
    lr=2e-4,
)
