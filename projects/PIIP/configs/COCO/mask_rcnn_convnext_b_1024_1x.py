"""ConvNeXt-B 1024: Mask R-CNN 1x on COCO."""

from piip.recipes import detector

model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "convnext_b_1024",
    layer_decay=None,
)
