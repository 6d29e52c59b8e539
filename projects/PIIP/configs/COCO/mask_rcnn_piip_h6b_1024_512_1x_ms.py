"""PIIP-H6B 1024/512, global attention: Mask R-CNN 1x with multi-scale training on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "piip_h6b_1024_512",
    crop=1024,
)
