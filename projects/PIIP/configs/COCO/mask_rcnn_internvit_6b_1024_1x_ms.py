"""InternViT-6B 1024, global attention: Mask R-CNN 1x with multi-scale training on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "internvit_6b_1024",
    crop=1024,
    layer_decay=0.95,
)
