"""PIIP-LH6B 1536/1024/512, global attention: Mask R-CNN 1x with multi-scale training on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_lh6b_1536_1024_512",
    crop=1536,
    batch_size=32,
    lr=2e-4,
)
