"""PIIP dinov3:s,b,l, frozen 1568/1120/672: Cascade R-CNN 3x with multi-scale training on COCO.

Licence of the pretrained weights: dinov3-license.
"""

from piip.recipes import detector

# The published pyramids' rate, for interactions, merging, pyramid and heads
model, data, dataloader, optimizer, lr_multiplier, train = detector(
    "cascade_mask_rcnn_piip_dinov3_sbl_1568_1120_672_frozen_3x_ms",
    crop=1568,
    epochs=36,
    lr_drops=(27, 33),
)
