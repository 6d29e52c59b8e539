"""ViT-L 1024, windows of 14, every third block global: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "vit_l_1024",
    layer_decay=0.95,
)
