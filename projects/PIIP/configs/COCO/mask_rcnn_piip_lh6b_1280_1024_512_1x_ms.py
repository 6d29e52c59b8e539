"""PIIP-LH6B 1280/1024/512, windows of 14: Mask R-CNN 1x with multi-scale training on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_lh6b_1280_1024_512",
    crop=1280,
)
